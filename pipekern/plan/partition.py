"""The cut of a row of layers into contiguous stages with the fastest slowest stage, or the fastest step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

from pipekern.errors import ConfigError
from pipekern.plan import orders
from pipekern.plan.lattice import Lattice, fixed_order
from pipekern.plan.pool import Pool
from pipekern.plan.search import shortest_step, smallest_bottleneck
from pipekern.plan.solver import Solver
from pipekern.plan.table import Cut
from pipekern.schedule.exact import fractions, number, scaled

_MOST_STATES = 1 << 24
_COMPILED_BITS = 126
_EXACT_BITS = 64
_ROUNDED_BITS = 32  # so that the sums of costs of 53 bits mostly fit in the 126 of the compiled table


class Partition(NamedTuple):
    """Stage ``k`` has the layers ``bounds[k]`` to ``bounds[k + 1] - 1``, takes ``times[k]`` and is on ``devices[k]``.

    ``bottleneck`` is the largest of ``times``, in the unit of the costs; ints where it is whole. What was asked for,
    bottleneck or step, is at most 1 + ``gap`` times the smallest there is: 0 where it is proven to be that.
    """

    bounds: tuple[int, ...]
    bottleneck: float
    times: tuple[float, ...]
    devices: tuple[int, ...]
    gap: float = 0.0

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
    line = _line(costs, parts, speeds, cut_costs, memory)
    lattice = Lattice(fixed_order(parts), line.done, line.cuts, line.factors, line.held, line.caps)
    cut = smallest_bottleneck(lattice) if microbatches is None else shortest_step(lattice, _checked(microbatches))
    if cut is None:
        raise ConfigError(_too_large(line, lambda caps: bool(replace(lattice, caps=caps).windows(lattice.endless))))
    return line.partition(cut, 0.0)


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

    ``parts`` defaults to all devices. ``devices`` of the result are types. The search is over how many devices of each
    type are in use, with the bounds of Lagrange's relaxation of their numbers, until its result is proven or a set
    amount of work is done: then ``gap`` tells how much better another one may be. Times that need
    more than 128 bits with their bounds are rounded down to fewer. Raises ``ConfigError`` also where
    there is no device or fewer than parts, and for more than 2²⁴ choices of counts, such as four types of 64.
    """
    if not counts or min(counts) < 0 or sum(counts) < 1 or len(speeds) != len(counts):
        raise ConfigError(
            f"counts={list(counts)}, speeds={list(speeds)}: give at least one device, and one of each a type"
        )
    parts = sum(counts) if parts is None else parts
    if parts > sum(counts):
        raise ConfigError(f"parts={parts}: there are {sum(counts)} devices, one a stage; nearest parts={sum(counts)}")
    _check_parts(parts, len(costs))
    present = [kind for kind, count in enumerate(counts) if count]
    if len(present) == 1:
        return _of_one_type(present[0], costs, parts, speeds, cut_costs, memory, microbatches)
    line = _line(costs, parts, speeds, cut_costs, memory)
    pool = Pool(parts, counts, line.done, line.cuts, line.factors, line.held, line.caps)
    if pool.states > _MOST_STATES:
        raise ConfigError(
            f"counts={list(counts)}: {pool.states} choices of how many are in use are more than {_MOST_STATES}; give "
            "devices in a fixed order, or take types that are nearly alike as one"
        )
    wide = max(0, pool.beyond.bit_length() - _COMPILED_BITS)
    pool = replace(pool, done=[done >> wide for done in pool.done], cuts=[cut >> wide for cut in pool.cuts])
    solver = Solver(pool)
    if microbatches is None:
        best = orders.smallest_bottleneck(solver)
    else:
        best = orders.shortest_step(solver, _checked(microbatches))
    if best.cut is None:
        raise ConfigError(_too_large(line, lambda caps: Solver(replace(pool, caps=caps)).reaches(pool.endless).may))
    return line.partition(best.cut, best.gap)


def _of_one_type(
    kind: int,
    costs: Sequence[float],
    parts: int,
    speeds: Sequence[float],
    cut_costs: Sequence[float] | None,
    memory: StageMemory | None,
    microbatches: int | None,
) -> Partition:
    """Where there is nothing to arrange."""
    if memory and isinstance(memory.caps, Sequence) and kind < len(memory.caps):
        memory = replace(memory, caps=memory.caps[kind])
    found = partition(costs, parts, [speeds[kind]] * parts, cut_costs, memory=memory, microbatches=microbatches)
    return found._replace(devices=(kind,) * parts)


def _check_parts(parts: int, layers: int) -> None:
    if not 1 <= parts <= layers:
        raise ConfigError(
            f"parts={parts}: {layers} layers make at least 1 and at most {max(1, layers)} stages, one layer each"
        )


def _checked(microbatches: int) -> int:
    if microbatches < 1:
        raise ConfigError(f"microbatches={microbatches}; a step needs at least 1")
    return microbatches


@dataclass(frozen=True)
class _Line:
    """A row of layers in integers, as :class:`Lattice` has it: times of 1 / ``scale``, memory of 1 / ``byte``."""

    parts: int
    done: Sequence[int]
    cuts: Sequence[int]
    factors: Sequence[int]
    held: Sequence[Sequence[int]]
    caps: Sequence[int]
    scale: int
    byte: int

    def partition(self, cut: Cut, gap: float) -> Partition:
        """In the unit of the costs."""
        times = [
            (self.done[b] - self.done[a]) * self.factors[device] + self.cuts[a] + self.cuts[b]
            for a, b, device in zip(cut.bounds[:-1], cut.bounds[1:], cut.devices, strict=True)
        ]
        numbers = tuple(number(time, self.scale) for time in times)
        return Partition(cut.bounds, number(max(times), self.scale), numbers, cut.devices, gap)


def _line(
    costs: Sequence[float],
    parts: int,
    speeds: Sequence[float],
    cut_costs: Sequence[float] | None,
    memory: StageMemory | None,
) -> _Line:
    work = [Fraction(0), *accumulate(fractions("costs", costs))]
    by, factors = _factors(speeds)
    unit, (done, cuts) = scaled(work, _cuts(cut_costs, len(costs)))
    held, caps, byte = _held(memory, len(costs), parts, len(speeds)) if memory else ([], [], 1)
    return _Line(parts, done, [cut * by for cut in cuts], factors, held, caps, unit * by, byte)


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


def _too_large(line: _Line, fits: Callable[[list[int]], bool]) -> str:
    """How much every cap would have to grow at least, by bisection, to a thousandth."""
    low, high = 1, max(row[-1] for row in line.held)
    while low + (high >> 10) < high:
        middle = (low + high) // 2
        if fits([cap + middle for cap in line.caps]):
            high = middle
        else:
            low = middle + 1
    caps = ", ".join(f"{cap / line.byte:.6g}" for cap in sorted(set(line.caps)))
    return (
        f"memory: no cut of {len(line.done) - 1} layers into {line.parts} stages stays within caps={caps} bytes; every "
        f"device would need at least {math.ceil(Fraction(low, line.byte))} bytes more: use more stages, devices with "
        "more memory, or a schedule with fewer micro-batches in flight"
    )
