"""How the units of a model are spread over the stages of a schedule whose ranks do not compute equally fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from pipekern.errors import ConfigError
from pipekern.plan.memory import activation_bytes
from pipekern.plan.partition import StageMemory, partition
from pipekern.schedule.exact import fractions
from pipekern.schedule.ir import Schedule
from pipekern.schedule.replay import Replay
from pipekern.schedule.simulate import Costs, peak_activations

_FEW = 8  # stages, up to which two moves at once are tried: their number grows with the fourth power


class Balance(NamedTuple):
    """``split`` has the units of each stage, ``step`` is the time of a step in the unit of the costs."""

    split: tuple[int, ...]
    step: float


@dataclass(frozen=True)
class UnitCosts:
    """What units take on one micro-batch where the slowness is 1, one value each, in one unit of time.

    ``backward`` is the input gradient, ``weight`` the weight gradient. ``comm`` is what a message takes: one value, or
    one a unit, of its output.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    weight: Sequence[float]
    comm: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        comm = self.comm if isinstance(self.comm, Sequence) else [self.comm] * len(self.forward)
        rows = {"forward": self.forward, "backward": self.backward, "weight": self.weight, "comm": comm}
        for name, row in rows.items():
            fractions(name, row)
            if len(row) != len(self.forward):
                raise ConfigError(f"{name} has {len(row)} values for {len(self.forward)} units; give one a unit")


@dataclass(frozen=True)
class UnitMemory:
    """Bytes: ``fixed`` of each unit wherever it is, ``activations`` it keeps of a micro-batch, ``caps`` of each rank.

    Activations count whole from F to W, in the order of the schedule.
    """

    fixed: Sequence[float]
    activations: Sequence[float]
    caps: Sequence[float]


def predicted(split: Sequence[int], costs: UnitCosts, schedule: Schedule, slowness: Sequence[float]) -> float:
    """The simulated step with ``split[d]`` units at depth d: exact for the costs, without sums over replicas.

    A unit takes ``slowness[r]`` times its costs on rank r. Raises ``ConfigError`` for bad input, and for a split that
    does not give every stage a unit and every unit a stage.
    """
    ranks = _Ranks(costs, schedule, slowness)
    units = len(costs.forward)
    if len(split) != schedule.depth or sum(split) != units or min(split) < 1:
        raise ConfigError(
            f"split={list(split)}: give each of {schedule.depth} stages at least one of {units} units, and all of them "
            f"{units} together"
        )
    return schedule.simulate(Costs(*ranks.times(split))).makespan


def balance(
    costs: UnitCosts, schedule: Schedule, slowness: Sequence[float], *, memory: UnitMemory | None = None
) -> Balance:
    """The split with the shortest simulated step of ``schedule``, each stage staying on its rank; see `predicted`.

    The search starts from cuts that are exact for the slowest stage and for the sum of stages, and moves units between
    stages, in simulation, as long as that shortens the step: no split that differs by the move of one unit is better,
    or of two up to 8 stages; one that differs by more may be. With ``memory`` no rank holds more than its cap. Raises
    ``ConfigError`` for bad input, and where no split is found within the caps.
    """
    best = _Search(_Ranks(costs, schedule, slowness), memory).best()
    if best.excess > 0:
        raise ConfigError(
            f"memory: no split of {len(costs.forward)} units for {schedule.name} was found within the caps; the "
            f"nearest, {list(best.split)}, holds {math.ceil(best.excess)} bytes too much over all ranks: raise caps, "
            "take a schedule with fewer micro-batches in flight, or more ranks"
        )
    return Balance(best.split, predicted(best.split, costs, schedule, slowness))


class _Ranks:
    """What splits cost the stages of a schedule, on the ranks they are on."""

    def __init__(self, costs: UnitCosts, schedule: Schedule, slowness: Sequence[float]):
        units = len(costs.forward)
        if schedule.depth > units:
            raise ConfigError(
                f"{schedule.name} has {schedule.depth} stages and the model {units} units; every stage needs one: use "
                "fewer ranks or chunks"
            )
        wrong = [value for value in slowness if not (value > 0 and math.isfinite(value))]
        if wrong or len(slowness) != schedule.ranks:
            raise ConfigError(
                f"slowness={list(slowness)}: give each of {schedule.ranks} ranks a factor, finite and above 0"
            )
        self.costs, self.schedule = costs, schedule
        self.factors = [slowness[rank] for rank in schedule.stage_rank]
        self._comm = costs.comm if isinstance(costs.comm, Sequence) else [costs.comm] * units
        self._before = [[0.0, *accumulate(row)] for row in (costs.forward, costs.backward, costs.weight)]

    def times(self, split: Sequence[int]) -> tuple[list[float], list[float], list[float], list[float]]:
        """Forward, backward and weight time of each stage; the time of a message from each to the next."""
        bounds = [0, *accumulate(split)]
        depth = self.schedule.depth
        stages = [(bounds[s % depth], bounds[s % depth + 1]) for s in range(self.schedule.stages)]
        forward, backward, weight = (
            [(before[end] - before[start]) * factor for (start, end), factor in zip(stages, self.factors, strict=True)]
            for before in self._before
        )
        return forward, backward, weight, [self._comm[end - 1] for _, end in stages[:-1]]


class _Tried(NamedTuple):
    """Ordered as splits are preferred. ``excess`` is what ranks hold beyond their caps, in bytes."""

    excess: float
    step: float
    split: tuple[int, ...]


class _Search:
    def __init__(self, ranks: _Ranks, memory: UnitMemory | None):
        self._ranks, self._memory, self._schedule = ranks, memory, ranks.schedule
        self._replay = Replay(ranks.schedule)
        rows = (ranks.costs.forward, ranks.costs.backward, ranks.costs.weight)
        self._done = [0.0, *accumulate(map(sum, zip(*rows[: 3 if ranks.schedule.trains else 1], strict=True)))]
        self._known: dict[tuple[int, ...], _Tried] = {}
        if memory:
            units = len(ranks.costs.forward)
            for name, count in {"fixed": units, "activations": units, "caps": ranks.schedule.ranks}.items():
                values = getattr(memory, name)
                if len(values) != count or not all(value >= 0 for value in values):
                    raise ConfigError(f"memory.{name}={list(values)}: give {count} numbers of at least 0, in bytes")

    def starts(self) -> Iterator[tuple[int, ...]]:
        """As many units each, and cuts for the slowest stage alone and for the sum of stages with it."""
        schedule, costs = self._schedule, self._ranks.costs
        depth = schedule.depth
        work = [sum(one) for one in zip(costs.forward, costs.backward, costs.weight, strict=True)]
        speeds = [1 / max(self._ranks.factors[d::depth]) for d in range(depth)]
        yield tuple((d + 1) * len(work) // depth - d * len(work) // depth for d in range(depth))
        for microbatches in (None, schedule.microbatches * schedule.chunks):
            found = partition(work, depth, speeds, memory=self._stage_memory(), microbatches=microbatches)
            yield tuple(end - start for start, end in pairwise(found.bounds))

    def _stage_memory(self) -> StageMemory | None:
        """Caps that a cut can keep to: where each rank has one stage they are all there is."""
        memory, schedule = self._memory, self._schedule
        if not memory or len(set(schedule.stage_rank)) < schedule.stages:
            return None
        whole = sum(memory.fixed) + sum(memory.activations) * schedule.units
        caps = [min(memory.caps[rank], whole) for rank in schedule.stage_rank]
        held = peak_activations(schedule)
        return StageMemory(memory.fixed, memory.activations, [held[rank] for rank in schedule.stage_rank], caps)

    def best(self) -> _Tried:
        """From every start to where no move makes it better, and from the best of these on by two moves at once."""
        best = min(self._descend(self._tried(split), _moves) for split in self.starts())
        return self._descend(best, _two_moves) if len(best.split) <= _FEW else best

    def _descend(self, best: _Tried, near: Callable[[tuple[int, ...]], Iterable[tuple[int, ...]]]) -> _Tried:
        while True:
            bounds = sorted((self._bound(split), split) for split in near(best.split))
            others = (self._tried(split) for bound, split in bounds if bound < best.step or best.excess > 0)
            better = next((other for other in others if other < best), None)
            if better is None:
                return best
            best = better

    def _bound(self, split: tuple[int, ...]) -> float:
        """What the busiest rank computes: no step is shorter."""
        schedule, busy = self._schedule, [0.0] * self._schedule.ranks
        work = [self._done[end] - self._done[end - size] for size, end in zip(split, accumulate(split), strict=True)]
        for stage, (rank, factor) in enumerate(zip(schedule.stage_rank, self._ranks.factors, strict=True)):
            busy[rank] += work[stage % schedule.depth] * factor
        return max(busy) * (schedule.microbatches // schedule.chains)

    def _tried(self, split: tuple[int, ...]) -> _Tried:
        if split not in self._known:
            step = self._replay.makespan(*self._ranks.times(split))
            self._known[split] = _Tried(self._excess(split), step, split)
        return self._known[split]

    def _excess(self, split: tuple[int, ...]) -> float:
        memory, schedule = self._memory, self._schedule
        if not memory:
            return 0.0
        parts = [slice(end - size, end) for size, end in zip(split, accumulate(split), strict=True)]
        held = activation_bytes(schedule, [sum(memory.activations[part]) for part in parts])
        for rank, cap in enumerate(memory.caps):
            held[rank] += sum(sum(memory.fixed[parts[s % schedule.depth]]) for s in schedule.stages_of(rank))
            held[rank] -= cap
        return sum(max(0.0, over) for over in held)


def _moves(split: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every split in which one stage has a unit less and another one more."""
    for source, units in enumerate(split):
        for target in range(len(split)):
            if units > 1 and source != target:
                moved = list(split)
                moved[source] -= 1
                moved[target] += 1
                yield tuple(moved)


def _two_moves(split: tuple[int, ...]) -> set[tuple[int, ...]]:
    return {second for first in _moves(split) for second in _moves(first)}
