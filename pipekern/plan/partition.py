"""The cut of a row of layers into contiguous stages with the fastest slowest stage, or the fastest step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

from pipekern.errors import ConfigError
from pipekern.plan.lattice import Lattice, Levels, fixed_order, free_order
from pipekern.plan.search import shortest_step, smallest_bottleneck
from pipekern.plan.table import Cut
from pipekern.schedule.exact import fractions, number, scaled

_EXACT_BITS = 64
_ROUNDED_BITS = 32  # so that the sums of costs of 53 bits mostly fit in the 126 of the compiled table


class Partition(NamedTuple):
    """Stage ``k`` has the layers ``bounds[k]`` to ``bounds[k + 1] - 1``, takes ``times[k]`` and is on ``devices[k]``.

    ``bottleneck`` is the largest of ``times``, in the unit of the costs; ints where it is whole.
    """

    bounds: tuple[int, ...]
    bottleneck: float
    times: tuple[float, ...]
    devices: tuple[int, ...]

    def step(self, microbatches: int) -> float:
        """The time of a step without bubbles inside: all stages once, the slowest for every other micro-batch."""
        return sum(self.times) + (microbatches - 1) * self.bottleneck


@dataclass(frozen=True)
class StageMemory:
    """What a stage may hold, in bytes.

    ``fixed`` is what each layer takes wherever it is (weights, gradients, optimizer state), ``activations`` what it
    holds of one micro-batch. The stage at position ``k`` holds ``in_flight[k]`` micro-batches (p - k under 1f1b) and
    has ``caps``: one value for all devices, or one a device (one a type where the order is free).
    """

    fixed: Sequence[float]
    activations: Sequence[float]
    in_flight: Sequence[float]
    caps: float | Sequence[float]


def partition(
    costs: Sequence[float],
    parts: int,
    speeds: Sequence[float] | None = None,
    cut_costs: Sequence[float] | None = None,
    *,
    memory: StageMemory | None = None,
    microbatches: int | None = None,
) -> Partition:
    """Cut ``costs``, one a layer, into ``parts`` stages of at least one layer: the smallest bottleneck there is.

    A stage of the layers ``i`` to ``j - 1`` takes their costs divided by its speed (``speeds``, one a stage in
    order; default 1), plus ``cut_costs[i] + cut_costs[j]`` (one more than there are layers; the first and last charge
    the two ends of the model; default 0). With ``microbatches`` = m the smallest sum + (m - 1) × bottleneck instead.
    ``memory`` caps what a stage holds. Exact, in integers; speeds without a common multiple of 64 bits are rounded to
    32 bits. Raises ``ConfigError`` for fewer layers than parts, for values that are no costs, speeds or bytes, and
    where no cut stays within the caps, saying by how much.
    """
    _check_parts(parts, len(costs))
    speeds = [1] * parts if speeds is None else speeds
    if len(speeds) != parts:
        raise ConfigError(f"speeds={list(speeds)}: {parts} stages need {parts} of them, one each")
    return _solve(fixed_order(parts), costs, speeds, cut_costs, memory, microbatches)


def partition_types(
    costs: Sequence[float],
    counts: Sequence[int],
    speeds: Sequence[float],
    parts: int | None = None,
    cut_costs: Sequence[float] | None = None,
    *,
    memory: StageMemory | None = None,
    microbatches: int | None = None,
) -> Partition:
    """As :func:`partition`, over all orders of devices of a few types: ``counts[t]`` of them with ``speeds[t]``.

    ``parts`` defaults to all devices. ``devices`` of the result are types. The number of states grows with the product
    of the counts. Raises ``ConfigError`` also where there is no device or fewer than parts.
    """
    if not counts or min(counts) < 0 or sum(counts) < 1 or len(speeds) != len(counts):
        raise ConfigError(
            f"counts={list(counts)}, speeds={list(speeds)}: give at least one device, and one of each a type"
        )
    parts = sum(counts) if parts is None else parts
    if parts > sum(counts):
        raise ConfigError(f"parts={parts}: there are {sum(counts)} devices, one a stage; nearest parts={sum(counts)}")
    _check_parts(parts, len(costs))
    return _solve(free_order(parts, counts), costs, speeds, cut_costs, memory, microbatches)


def _check_parts(parts: int, layers: int) -> None:
    if not 1 <= parts <= layers:
        raise ConfigError(
            f"parts={parts}: {layers} layers make at least 1 and at most {max(1, layers)} stages, one layer each"
        )


def _solve(
    levels: Levels,
    costs: Sequence[float],
    speeds: Sequence[float],
    cut_costs: Sequence[float] | None,
    memory: StageMemory | None,
    microbatches: int | None,
) -> Partition:
    work = [Fraction(0), *accumulate(fractions("costs", costs))]
    by, factors = _factors(speeds)
    unit, (done, cuts) = scaled(work, _cuts(cut_costs, len(costs)))
    held, caps, byte = _held(memory, len(costs), len(levels) - 1, len(speeds)) if memory else ([], [], 1)
    lattice = Lattice(levels, done, [cut * by for cut in cuts], factors, held, caps)
    cut = _best(lattice, microbatches)
    if cut is None:
        raise ConfigError(_too_large(lattice, byte))
    times = [lattice.time(*stage) for stage in zip(cut.bounds[:-1], cut.bounds[1:], cut.devices, strict=True)]
    scale = unit * by
    return Partition(cut.bounds, number(cut.longest, scale), tuple(number(t, scale) for t in times), cut.devices)


def _best(lattice: Lattice, microbatches: int | None) -> Cut | None:
    if microbatches is None:
        return smallest_bottleneck(lattice)
    if microbatches < 1:
        raise ConfigError(f"microbatches={microbatches}; a step needs at least 1")
    return shortest_step(lattice, microbatches)


def _cuts(cut_costs: Sequence[float] | None, layers: int) -> list[Fraction]:
    if cut_costs is None:
        return [Fraction(0)] * (layers + 1)
    if len(cut_costs) != layers + 1:
        raise ConfigError(
            f"cut_costs has {len(cut_costs)} values; {layers} layers need {layers + 1}, one before each and one after"
        )
    return fractions("cut_costs", cut_costs)


def _factors(speeds: Sequence[float]) -> tuple[int, list[int]]:
    """A scale and, for each speed, the time of one unit of work as an integer of 1 / scale."""
    for speed in speeds:
        if not (speed > 0 and math.isfinite(speed)):
            raise ConfigError(f"speeds={speed} is not a finite number above 0; leave a device that does nothing out")
    slowness = [1 / Fraction(speed) for speed in speeds]
    scale, (factors,) = scaled(slowness)
    if max(factors).bit_length() > _EXACT_BITS:
        scale = math.ceil((1 << _ROUNDED_BITS) / min(slowness))
        factors = [round(value * scale) for value in slowness]
    return scale, factors


def _held(memory: StageMemory, layers: int, parts: int, devices: int) -> tuple[list[list[int]], list[int], int]:
    """For every position, the memory of the layers before each layer; the caps; and the scale of both to a byte."""
    caps = memory.caps if isinstance(memory.caps, Sequence) else [memory.caps] * devices
    expected = {"fixed": layers, "activations": layers, "in_flight": parts, "caps": devices}
    given = [memory.fixed, memory.activations, memory.in_flight, caps]
    exact = []
    for (name, count), values in zip(expected.items(), given, strict=True):
        if len(values) != count:
            raise ConfigError(f"memory.{name} has {len(values)} values; it needs {count}")
        exact.append(fractions(f"memory.{name}", values))
    by, (in_flight,) = scaled(exact[2])
    unit, (fixed, activations, limits) = scaled(exact[0], exact[1], exact[3])
    always, each = [0, *accumulate(fixed)], [0, *accumulate(activations)]
    before = {held: [f * by + a * held for f, a in zip(always, each, strict=True)] for held in set(in_flight)}
    return [before[held] for held in in_flight], [limit * by for limit in limits], unit * by


def _too_large(lattice: Lattice, byte: int) -> str:
    """How much every cap would have to grow at least, by bisection."""
    low, high = 1, max(row[-1] for row in lattice.held)
    while low < high:
        middle = (low + high) // 2
        wider = dataclasses.replace(lattice, caps=[cap + middle for cap in lattice.caps])
        if not wider.windows(lattice.endless):
            low = middle + 1
        else:
            high = middle
    caps = ", ".join(f"{cap / byte:.6g}" for cap in sorted(set(lattice.caps)))
    return (
        f"memory: no cut of {lattice.layers} layers into {lattice.parts} stages stays within caps={caps} bytes; every "
        f"device would need at least {math.ceil(Fraction(low, byte))} bytes more: use more stages, devices with more "
        "memory, or a schedule with fewer micro-batches in flight"
    )
