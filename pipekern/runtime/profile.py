"""Measured costs of a model's layers."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from pipekern.errors import ConfigError
from pipekern.stage.deferral import Deferral
from pipekern.stage.random import preserved
from pipekern.stage.skip import Carried
from pipekern.stage.spec import LayerSpec
from pipekern.stage.unit import Unit, cut
from pipekern.transport.value import distinct, map_tensors, tensors


@dataclass(frozen=True)
class LayerCosts:
    """Microseconds of one micro-batch a unit: ``forward``, ``backward``, and ``weight``, what can be put off of it.

    ``copy`` is what a copy of the unit's output takes; empty where it is not known.
    """

    names: tuple[str, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    copy: tuple[float, ...] = ()

    @classmethod
    def given(cls, costs: Sequence[float]) -> LayerCosts:
        """Costs that are known already, one number a unit in any unit of measure. Raises ``ConfigError``."""
        if not costs or min(costs) < 0:
            raise ConfigError(f"costs {list(costs)}: give one number of at least 0 a unit")
        nothing = (0.0,) * len(costs)
        return cls(tuple(map(str, range(len(costs)))), tuple(map(float, costs)), nothing, nothing)

    def total(self) -> list[float]:
        """Everything together, a unit."""
        return [sum(row) for row in zip(self.forward, self.backward, self.weight, strict=True)]


def profile(
    model: nn.Module | Sequence[LayerSpec], x: Any, *, repeats: int = 5, inputs: Sequence[str] | None = None
) -> LayerCosts:
    """Run each unit of ``model`` forward and backward on what it gets from the one before, and take medians.

    ``x`` is one micro-batch; ``inputs`` is as in ``Pipeline``. It works on a copy: weights, gradients, buffers and
    random state of ``model`` stay as they are.
    """
    source = copy.deepcopy(model) if isinstance(model, nn.Module) else model
    units = cut(source, 0, inputs)[1]
    units = [unit.built() for unit in units]
    device = next((p.device for unit in units for _, p in unit.named_parameters()), torch.device("cpu"))
    value, rows = x, []
    with preserved([device]):
        for unit in units:
            runs = [_time(unit, value, device) for _ in range(repeats + 1)][1:]
            rows.append([statistics.median(times) for times in zip(*runs, strict=True)])
            with torch.no_grad():
                value = _leaves(unit.call(unit.train)(_copied(value)))
    return LayerCosts(tuple(unit.name for unit in units), *map(tuple, zip(*rows, strict=True)))


def _time(unit: Unit, value: Any, device: torch.device) -> tuple[float, ...]:
    value, deferral = _copied(value), Deferral(unit.train.modules())
    with deferral:
        clock = [_now(device)]
        output = unit.call(unit.train)(value)
        clock.append(_now(device))
        ends = [t for t in distinct(tensors(output)) if t.requires_grad]
        if ends:
            torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])
        clock.append(_now(device))
    for work in deferral.take():
        work()
    clock.append(_now(device))
    with torch.no_grad():
        _copied(output.value if isinstance(output, Carried) else output)
    clock.append(_now(device))
    return tuple((end - start) / 1e3 for start, end in pairwise(clock))


def _copied(value: Any) -> Any:
    """What a unit may write into, as it may not into a leaf or the user's batch."""
    return map_tensors(torch.clone, value)


def _now(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter_ns()


def _leaves(value: Any) -> Any:
    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone().requires_grad_(tensor.is_floating_point() or tensor.is_complex())

    return map_tensors(leaf, value)
