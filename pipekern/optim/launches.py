"""Parameters in the fewest launches: alike in device, dtypes, and the number of steps taken."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.kernels.grad_stats import grad_stats
from pipekern.kernels.table import Table
from pipekern.parallel.tensor import local
from pipekern.transport.value import moved

State = MutableMapping[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Launch:
    """What one launch of ``adamw_step`` changes."""

    table: Table
    grads: Table
    progress: Tensor  # int32 [2], as the kernel counts

    @property
    def dtype(self) -> torch.dtype:
        return self.table.columns[0][0].dtype

    @property
    def device(self) -> torch.device:
        return self.progress.device


class Launches:
    """The launches over all parameters that have a gradient; good as long as these are the same tensors.

    Makes ``state`` where a parameter has none. Its ``step`` is a view of the launch's progress: the parameters of a
    launch share it, and those that sit out a step keep the old one, so that they advance apart from then on.

    Args:
        parameters: All, in the order of the norm's rows, each with the number of its group.
        state: The optimizer's.
        copies: For some parameters the tensor of 16 bits that gets their new values.

    Raises:
        ConfigError: A gradient is sparse, or does not lie in memory as its parameter does.
    """

    def __init__(
        self, parameters: Sequence[tuple[nn.Parameter, int]], state: State, copies: Mapping[nn.Parameter, Tensor]
    ):
        self.grads = [p.grad for p, _ in parameters]
        active = [(p, group) for p, group in parameters if p.grad is not None]
        self.parameters = [p for p, _ in active]
        alike = _alike(self.parameters, state, copies)
        self.launches = [_launch([active[i] for i in places], state, copies) for places in alike]
        self._home = next((p.device for p, _ in parameters), torch.device("cpu"))
        order = torch.tensor([i for places in alike for i in places], dtype=torch.int64)
        self._rows = order.argsort().to(self._home) if len(alike) > 1 else None

    def hold(self, parameters: Sequence[tuple[nn.Parameter, int]]) -> bool:
        """Whether these are the parameters' gradients still."""
        return len(parameters) == len(self.grads) and all(
            p.grad is grad for (p, _), grad in zip(parameters, self.grads, strict=True)
        )

    def stats(self) -> Tensor:
        """float32 [n, 2]: a row of :func:`grad_stats` for each parameter with a gradient, in their order."""
        rows = [moved(grad_stats(launch.grads), self._home) for launch in self.launches]
        if self._rows is None:
            return rows[0] if rows else torch.zeros(0, 2, device=self._home)
        return torch.cat(rows)[self._rows]


def fresh_moment(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)


def _alike(parameters: list[nn.Parameter], state: State, copies: Mapping[nn.Parameter, Tensor]) -> list[list[int]]:
    places: dict[Any, list[int]] = {}
    zeros: dict[torch.device, Tensor] = {}
    for place, p in enumerate(parameters):
        assert p.grad is not None
        if p.grad.layout is not torch.strided:
            raise ConfigError(
                f"the gradient of parameter {place}, shape {tuple(p.shape)}, is {p.grad.layout}; AdamW takes dense "
                "ones: make its layer with sparse=False"
            )
        own = state[p]
        if not own:
            zero = zeros.setdefault(p.device, torch.zeros((), dtype=torch.int32, device=p.device))
            own.update(step=zero, exp_avg=fresh_moment(p), exp_avg_sq=fresh_moment(p))
        copy = copies[p].dtype if p in copies else None
        places.setdefault((p.device, p.dtype, p.grad.dtype, copy, id(own["step"])), []).append(place)
    return list(places.values())


def _launch(members: list[tuple[nn.Parameter, int]], state: State, copies: Mapping[nn.Parameter, Tensor]) -> Launch:
    parameters = [p for p, _ in members]
    grads = [p.grad for p in parameters if p.grad is not None]
    moments = [[state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq")]
    low = [copies[p] for p in parameters if p in copies]
    columns: list[list[Tensor]] = [[*parameters], grads, *moments, *([low] if low else [])]
    table = Table(*([local(tensor) for tensor in column] for column in columns), groups=[group for _, group in members])
    progress = torch.zeros(2, dtype=torch.int32, device=parameters[0].device)
    progress[:1].copy_(state[parameters[0]]["step"])
    step = progress[0]
    for p in parameters:
        state[p]["step"] = step
    return Launch(table, Table(list(map(local, grads))), progress)
