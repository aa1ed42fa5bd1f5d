"""Which units make their activations again in the backward, so that a rank stays under its memory at the least time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipekern.errors import ConfigError
from pipekern.plan.memory import size
from pipekern.schedule.ir import Schedule

_MOST = 1024  # plans to go on with; more are thinned out, to 1/1024 of the memory where a rank has one stage


class Way(NamedTuple):
    """One way to run a unit: ``kept`` bytes from its forward to its backward, ``added`` microseconds a micro-batch."""

    how: str
    kept: float
    added: float


@dataclass(frozen=True)
class UnitWays:
    """The ``ways`` to run a unit, the first of which makes nothing again; what it keeps for put-off weight work, in
    bytes from its B to its W, is ``waiting``.
    """

    ways: Sequence[Way]
    waiting: float = 0.0


class _Plan(NamedTuple):
    """Some of a rank's units decided, ``how`` for the last of them, ``before`` for the others: time, bytes at each
    moment, bytes of a unit that is being made again.
    """

    added: float
    loads: tuple[float, ...]
    again: float = 0.0
    how: str = ""
    before: _Plan | None = None

    @property
    def peak(self) -> float:
        return max(self.loads) + self.again

    def hows(self) -> list[str]:
        """Of every unit, in order."""
        found, plan = [], self
        while plan.before is not None:
            found.append(plan.how)
            plan = plan.before
        return found[::-1]


def choose_recompute(
    schedule: Schedule, stages: Sequence[Sequence[UnitWays]], fixed: Sequence[float], limits: Sequence[float]
) -> list[list[str]]:
    """How each unit of ``stages`` runs, by stage, at the least sum of added times on every rank.

    ``fixed[r]`` are the bytes that rank r holds whatever its activations are, ``limits[r]`` those that it may hold.
    Activations are counted in the order of the schedule, and on top of them what the largest unit that runs again makes
    meanwhile. Raises ``ConfigError`` where a rank's least is more than its limit: by how much, and what would do.
    """
    chosen: list[list[str]] = [[] for _ in stages]
    faults = []
    for rank in range(schedule.ranks):
        own = schedule.stages_of(rank)
        plan = _decide([stages[stage] for stage in own], _moments(schedule, rank, stages), limits[rank] - fixed[rank])
        if plan.peak + fixed[rank] > limits[rank]:
            need = plan.peak + fixed[rank]
            faults.append(
                f"rank {rank} needs {size(need)} at least ({size(fixed[rank])} for parameters and messages), "
                f"{size(need - limits[rank])} more than its {size(limits[rank])}"
            )
        hows = iter(plan.hows())
        for stage in own:
            chosen[stage] = [next(hows) for _ in stages[stage]]
    if faults:
        raise ConfigError(
            f"recompute='auto' finds no choice that fits: {'; '.join(faults)}; give that much memory, more ranks, "
            "smaller micro-batches, or a schedule that holds fewer activations ('v-min', '1f1b')"
        )
    return chosen


class _Moment(NamedTuple):
    """``counts`` of micro-batches that each stage of a rank holds from F to B, and ``waiting`` bytes from B to W."""

    counts: tuple[int, ...]
    waiting: float

    def within(self, other: _Moment) -> bool:
        """Whether ``other`` holds as much of everything."""
        return self.waiting <= other.waiting and all(a <= b for a, b in zip(self.counts, other.counts, strict=True))


def _moments(schedule: Schedule, rank: int, stages: Sequence[Sequence[UnitWays]]) -> list[_Moment]:
    """The moments of a step at which a rank may hold the most."""
    own = schedule.stages_of(rank)
    counts, waiting = dict.fromkeys(own, 0), 0.0
    found: dict[_Moment, None] = {}
    for op, stage, *_ in schedule.actions[rank]:
        kept = sum(unit.waiting for unit in stages[stage])
        counts[stage] += {"F": 1, "W": 0}.get(op, -1)
        waiting += {"B": kept, "W": -kept}.get(op, 0.0)
        found[_Moment(tuple(counts.values()), waiting)] = None
    return [one for one in found if not any(one is not other and one.within(other) for other in found)]


def _decide(stages: Sequence[Sequence[UnitWays]], moments: Sequence[_Moment], room: float) -> _Plan:
    """The fastest plan within ``room`` bytes, else the one that needs the least."""
    start = _Plan(0.0, tuple(moment.waiting for moment in moments))
    rows = [
        (unit, [moment.counts[place] for moment in moments]) for place, units in enumerate(stages) for unit in units
    ]
    plans = [start]
    for unit, counts in rows:
        grown = (_with(plan, unit, way, counts) for plan in plans for way in unit.ways)
        plans = _thinned((plan for plan in grown if plan.peak <= room), room)
    return min([*plans, _least(start, rows)], key=lambda plan: (plan.peak > room, plan.added, plan.again, plan.peak))


def _least(start: _Plan, rows: Sequence[tuple[UnitWays, Sequence[int]]]) -> _Plan:
    """What needs the least: of every unit the way that keeps the least, but for those that make too much again."""
    plans = []
    for most in {unit.ways[0].kept - way.kept for unit, _ in rows for way in unit.ways}:
        plan = start
        for unit, counts in rows:
            ways = [way for way in unit.ways if unit.ways[0].kept - way.kept <= max(0.0, most)]
            plan = _with(plan, unit, min(ways, key=lambda way: way.kept), counts)
        plans.append(plan)
    return min(plans, key=lambda plan: plan.peak)


def _with(plan: _Plan, unit: UnitWays, way: Way, counts: Iterable[int]) -> _Plan:
    loads = tuple(load + count * way.kept for load, count in zip(plan.loads, counts, strict=True))
    again = max(plan.again, unit.ways[0].kept - way.kept)
    return _Plan(plan.added + way.added, loads, again, way.how, plan)


def _thinned(plans: Iterable[_Plan], room: float) -> list[_Plan]:
    """Of plans that hold the same the fastest; where there are too many, also of those that hold about the same."""
    best: dict[tuple[float, ...], _Plan] = {}
    for plan in sorted(plans, key=lambda plan: plan.added):
        best.setdefault((*plan.loads, plan.again), plan)
    if len(best) <= _MOST:
        return list(best.values())
    cells = _MOST ** (1 / len(next(iter(best.values())).loads))
    coarse: dict[tuple[int, ...], _Plan] = {}
    for plan in best.values():
        coarse.setdefault(tuple(int(load / room * cells) for load in plan.loads), plan)
    return list(coarse.values())
