"""Measured costs of a model's layers."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from pipekern.errors import ConfigError
from pipekern.runtime.footprint import Run, footprint
from pipekern.stage.chain import chains
from pipekern.stage.deferral import Deferral
from pipekern.stage.random import preserved
from pipekern.stage.recompute import CHOICES
from pipekern.stage.skip import Carried
from pipekern.stage.spec import LayerSpec
from pipekern.stage.unit import Unit, cut
from pipekern.transport.value import distinct, map_tensors, tensors


@dataclass(frozen=True)
class LayerCosts:
    """Microseconds of one micro-batch a unit: ``forward``, ``backward``, and ``weight``, what can be put off of it.

    ``copy`` is what a copy of the unit's output takes; empty where it is not known.

    What ``recompute="auto"`` chooses by, empty where it was not measured: rows ``kept`` (bytes from a unit's forward to
    its backward) and ``added`` (microseconds more) with a value for each of ``"none"``, ``"selective"`` and ``"full"``;
    bytes that are ``waiting`` from there to put-off weight work; bytes of ``outputs`` that go to the next unit, of them
    those that a ``pk.Skip.save`` has ``saved``, and those that a stage keeps more where it ``ends`` with the unit.
    """

    names: tuple[str, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    copy: tuple[float, ...] = ()
    kept: tuple[tuple[float, ...], ...] = ()
    added: tuple[tuple[float, ...], ...] = ()
    waiting: tuple[float, ...] = ()
    outputs: tuple[float, ...] = ()
    ends: tuple[float, ...] = ()
    saved: tuple[float, ...] = ()

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> LayerCosts:
        """From plain values: what ``dataclasses.asdict`` gives, with tuples as lists, as JSON has them."""
        return cls(**{name: _tuples(value) for name, value in row.items()})

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
    """Run each unit of ``model`` forward and backward on what it gets from the one before, and take medians; also with
    recomputation, and count the bytes that it keeps.

    ``x`` is one micro-batch; ``inputs`` is as in ``Pipeline``. It works on a copy: weights, gradients, buffers and
    random state of ``model`` stay as they are.
    """
    source = copy.deepcopy(model) if isinstance(model, nn.Module) else model
    units = cut(source, 0, inputs)[1]
    units = [unit.built() for unit in units]
    device = next((p.device for unit in units for _, p in unit.named_parameters()), torch.device("cpu"))
    ways = [_ways(unit, index, device) for index, unit in enumerate(units)]
    value, rows, added = x, [], []
    with preserved([device]):
        for unit, runs in zip(units, ways, strict=True):
            plain, selective = (_median(unit, runs[how], value, device, repeats) for how in ("none", "selective"))
            rows.append(plain)
            more = sum(selective[:3]) - sum(plain[:3])
            added.append((0.0, max(0.0, more), plain[0]))  # "full" is a forward more, nearer than a difference tells
            with torch.no_grad():
                value = _leaves(runs["none"](_copied(value)))
        found = footprint(units, ways, x, _leaves)
    names = tuple(unit.name for unit in units)
    forward, backward, weight, copies = zip(*rows, strict=True)
    return LayerCosts(
        names,
        forward,
        backward,
        weight,
        copies,
        tuple(found.kept),
        tuple(added),
        tuple(found.waiting),
        tuple(found.outputs),
        tuple(found.ends),
        tuple(found.saved),
    )


def _ways(unit: Unit, index: int, device: torch.device) -> dict[str, Run]:
    """How a unit runs under each of ``CHOICES``."""
    made = chains([unit], index, device, *(([unit.train], [how]) for how in CHOICES))
    return {how: partial(run, [0]) for how, run in zip(CHOICES, made, strict=True)}


def _median(unit: Unit, run: Run, value: Any, device: torch.device, repeats: int) -> tuple[float, ...]:
    times = [_time(unit, run, value, device) for _ in range(repeats + 1)][1:]
    return tuple(statistics.median(column) for column in zip(*times, strict=True))


def _time(unit: Unit, run: Run, value: Any, device: torch.device) -> tuple[float, ...]:
    value, deferral = _copied(value), Deferral(unit.train.modules())
    with deferral:
        clock = [_now(device)]
        output = run(value)
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


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list | tuple) else value


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
