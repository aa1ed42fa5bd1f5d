"""The state of an optimizer under the names of parameters, so that it can move with them to another rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipekern.errors import CheckpointError
from pipekern.parallel.tensor import as_part, part_of

_HOST = "step"  # kept on the CPU by torch's optimizers, unless they are asked to be capturable or fused


class OptimizerState:
    """The state of ``optimizer``: tensors and numbers of each parameter, and the numbers of its groups.

    ``names`` are those of the parameters by their identity. Raises ``CheckpointError`` for parameters without one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str]):
        self._optimizer = optimizer
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        foreign = [tuple(p.shape) for p in {*grouped, *optimizer.state} if id(p) not in names]
        if foreign:
            raise CheckpointError(
                f"the optimizer has parameters of shape {foreign} that are not this pipeline's; give them their own"
            )
        self._place = {names[id(p)]: (p, group) for group in optimizer.param_groups for p in group["params"]}
        self._names = list(dict.fromkeys(names.values()))
        self._groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Parameter, name in its state, value."""
        for name, (parameter, _) in self._place.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield name, key, value

    def parameter(self, name: str) -> Tensor:
        """What the optimizer changes under this name."""
        return self._place[name][0]

    def of(self, parameter: Tensor, key: str) -> Tensor | None:
        """What is kept for it under ``key``, if anything."""
        return self._optimizer.state[parameter].get(key) if parameter in self._optimizer.state else None

    def row(self) -> dict[str, Any]:
        """All that are no tensors, as JSON; a 0-d tensor of a group (``lr``) as its number."""
        optimizer = self._optimizer
        groups = [{key: _plain(value) for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
        state = {
            name: {key: value for key, value in optimizer.state[parameter].items() if not isinstance(value, Tensor)}
            for name, (parameter, _) in self._place.items()
            if parameter in optimizer.state
        }
        return {"class": type(self._optimizer).__name__, "groups": groups, "names": self._groups, "state": state}

    def differences(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """What does not fit in the ``rows`` of all processes that saved."""
        first, own = rows[0], type(self._optimizer).__name__
        if first["class"] != own:
            yield f"the optimizer is {first['class']} in the checkpoint, {own} here"
            return
        if any(row["groups"] != first["groups"] for row in rows):
            yield "the ranks that saved had other numbers in their optimizer's groups (a learning rate of its own?)"
        if len(first["groups"]) != len(self._groups):
            yield f"the optimizer has {len(first['groups'])} groups in the checkpoint, {len(self._groups)} here"
            return
        there = {name: index for row in rows for index, names in enumerate(row["names"]) for name in names}
        here = {name: index for index, names in enumerate(self._groups) for name in names}
        for name in self._names:
            if there.get(name) != here.get(name):
                places = (f"group {place[name]}" if name in place else "no group" for place in (there, here))
                yield "{} is in {} of the optimizer in the checkpoint, in {} here".format(name, *places)

    def restore(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the numbers of ``rows``, and no tensor yet."""
        for group, saved in zip(self._optimizer.param_groups, rows[0]["groups"], strict=True):
            for key, value in saved.items():
                group[key] = _like(group.get(key), value)
        state = {name: numbers for row in rows for name, numbers in row["state"].items()}
        self._optimizer.state.clear()
        for name, (parameter, _) in self._place.items():
            if name in state:
                self._optimizer.state[parameter] = dict(state[name])

    def put(self, name: str, key: str, value: Tensor) -> None:
        """Set one tensor of the parameter ``name``, a copy of ``value``, where torch's optimizers want it."""
        parameter, group = self._place[name]
        on_host = key == _HOST and not group.get("capturable") and not group.get("fused")
        device = torch.device("cpu") if on_host else parameter.device
        value = value.to(device, copy=True)
        fits = value.shape == parameter.shape
        self._optimizer.state[parameter][key] = as_part(parameter, part_of(parameter, value)) if fits else value

    def __contains__(self, name: str) -> bool:
        return name in self._place


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _like(now: Any, value: Any) -> Any:
    if isinstance(now, Tensor):
        return now.fill_(value)
    return tuple(value) if isinstance(now, tuple) else value
