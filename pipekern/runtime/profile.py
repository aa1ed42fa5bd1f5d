"""Measured costs of a model's layers."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Hashable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from pipekern.errors import ConfigError
from pipekern.plan.cluster import Cluster, Device, Link
from pipekern.runtime.costs import DeviceTimes, LayerCosts, numbers
from pipekern.runtime.footprint import Look, Run, footprint, look
from pipekern.runtime.form import form
from pipekern.stage.chain import chains
from pipekern.stage.deferral import Deferral
from pipekern.stage.random import preserved
from pipekern.stage.recompute import CHOICES
from pipekern.stage.skip import Carried
from pipekern.stage.spec import LayerSpec
from pipekern.stage.unit import Unit, cut
from pipekern.transport.value import distinct, map_tensors, tensors

_LEAST = 3  # repeats of a unit
_LONG = 0.5  # seconds of measuring a unit in one way, after which no more repeats are needed
_SMALL, _LARGE = 8, 32 << 20  # bytes of the messages by which a link is measured


class _Measured(NamedTuple):
    """A unit's ``times`` (forward, backward, weight, copy), what "selective" takes ``more``, and its ``look``."""

    times: tuple[float, ...]
    more: float
    look: Look
    output: Any


def profile(
    model: nn.Module | Sequence[LayerSpec],
    x: Any,
    *,
    repeats: int = 9,
    inputs: Sequence[str] | None = None,
    devices: Sequence[str | torch.device] | None = None,
) -> LayerCosts:
    """Run each unit of ``model`` forward and backward on what it gets from the one before, and take medians; also with
    recomputation, and count the bytes that it keeps. Units of one form (classes, settings, shapes) are run once.

    ``x`` is one micro-batch; ``inputs`` is as in ``Pipeline``. ``devices`` (default: the one of ``model``), a rank's
    each, are measured once a kind, and so are copies from each to the next, for the time of a message. It works on a
    copy: weights, gradients, buffers and random state of ``model`` stay as they are. Raises ``ConfigError`` for a
    device that is not there.
    """
    places = _places(devices) if devices is not None else [_home(model)]
    kinds = list({_kind(place): place for place in reversed(places)}.items())[::-1]
    units, rows = _measure(model, x, kinds[0][1], repeats, inputs)
    others = []
    for kind, place in kinds[1:]:
        times = [row.times[:3] for row in _measure(model, x, place, repeats, inputs)[1]]
        others.append(DeviceTimes(kind, *zip(*times, strict=True)))
    found = footprint([row.look for row in rows], x)
    forward, backward, weight, copies = zip(*(row.times for row in rows), strict=True)
    whole = sum(forward) + sum(backward) + sum(weight)
    speeds = {one.device: whole / sum(map(sum, (one.forward, one.backward, one.weight))) for one in others}
    return LayerCosts(
        tuple(unit.name for unit in units),
        forward,
        backward,
        weight,
        copies,
        kept=tuple(found.kept),
        added=tuple((0.0, row.more, row.times[0]) for row in rows),  # nearer for "full" than a difference tells
        waiting=tuple(found.waiting),
        outputs=tuple(found.outputs),
        ends=tuple(found.ends),
        saved=tuple(found.saved),
        parameters=tuple(map(numbers, units)),
        samples=_samples(x),
        cluster=_cluster(places, speeds),
        others=tuple(others),
    )


def _measure(
    model: nn.Module | Sequence[LayerSpec], x: Any, device: torch.device, repeats: int, inputs: Sequence[str] | None
) -> tuple[list[Unit], list[_Measured]]:
    """Every unit on ``device``, one of each form. What one makes stands for what the others like it would."""
    source = copy.deepcopy(model).to(device) if isinstance(model, nn.Module) else model
    units = cut(source, 0, inputs)[1]
    value = map_tensors(lambda tensor: tensor.to(device), x)
    known: dict[Hashable, _Measured] = {}
    rows = []
    with preserved([device]):
        for index, unit in enumerate(units):
            key = form(unit, value)
            fresh = key not in known
            if fresh:
                known[key] = _one(unit, index, value, device, repeats)
            rows.append(known[key])
            if fresh or unit.skeleton is None:
                value = known[key].output
            else:  # it tells the next one which calls were made
                value = _output(_ways(unit, index, device)["none"], value)
    return units, rows


def _one(unit: Unit, index: int, value: Any, device: torch.device, repeats: int) -> _Measured:
    if unit.build is not None:
        unit = unit.built()
        unit.train.to(device)
    runs = _ways(unit, index, device)
    plain, selective = (_median(unit, runs[how], value, device, repeats) for how in ("none", "selective"))
    output = _output(runs["none"], value)
    more = max(0.0, round(sum(selective[:3]) - sum(plain[:3]), 3))
    return _Measured(plain, more, look(unit, runs, value, output), output)


def _output(run: Run, value: Any) -> Any:
    with torch.no_grad():
        return _leaves(run(_copied(value)))


def _home(model: nn.Module | Sequence[LayerSpec]) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next((p.device for p in parameters), torch.get_default_device())


def _places(devices: Sequence[str | torch.device]) -> list[torch.device]:
    found = list(map(torch.device, devices))
    if not found:
        raise ConfigError("devices=[]: there is nothing to measure on; leave devices out or name one")
    there = torch.cuda.device_count()
    for device in found:
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= there):
            known = ", ".join(["'cpu'", *(f"'cuda:{index}'" for index in range(there))])
            raise ConfigError(f"devices: there is no {str(device)!r} here; choose from {known}")
    return found


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _samples(x: Any) -> float:
    return next((t.shape[0] for t in tensors(x) if t.dim()), 1)


def _cluster(places: Sequence[torch.device], speeds: dict[str, float]) -> Cluster:
    hosts = sum(place.type == "cpu" for place in places)
    rows = [Device(speeds.get(_kind(place), 1.0), _memory(place, hosts), name=_kind(place)) for place in places]
    return Cluster(tuple(rows), tuple(_link(a, b) for a, b in pairwise(places)))


def _memory(device: torch.device, hosts: int) -> float:
    """All bytes of a GPU; those of the host shared out to its ``hosts`` ranks."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // hosts)


def _link(source: torch.device, target: torch.device) -> Link:
    """By copies in this process, which is what a message is; waking up the receiver comes to it."""
    small, large = (_copy_time(source, target, size) for size in (_SMALL, _LARGE))
    return Link(small, 1e6 * (_LARGE - _SMALL) / max(large - small, 1e-3))


def _copy_time(source: torch.device, target: torch.device, size: int) -> float:
    """Microseconds, the median."""
    given = torch.zeros(size, dtype=torch.uint8, device=source)
    taken = torch.zeros(size, dtype=torch.uint8, device=target)
    times = []
    for _ in range(_LEAST * 4):
        start = _now(source)
        taken.copy_(given)
        times.append((max(_now(source), _now(target)) - start) / 1e3)
    return statistics.median(times)


def _ways(unit: Unit, index: int, device: torch.device) -> dict[str, Run]:
    """How a unit runs under each of ``CHOICES``."""
    made = chains([unit], index, device, *(([unit.train], [how]) for how in CHOICES))
    return {how: partial(run, [0]) for how, run in zip(CHOICES, made, strict=True)}


def _median(unit: Unit, run: Run, value: Any, device: torch.device, repeats: int) -> tuple[float, ...]:
    _time(unit, run, value, device)
    times: list[tuple[float, ...]] = []
    end = time.perf_counter() + _LONG
    while len(times) < min(repeats, _LEAST) or (len(times) < repeats and time.perf_counter() < end):
        times.append(_time(unit, run, value, device))
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
