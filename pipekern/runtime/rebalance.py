"""When another split pays: for the speeds that the ranks have been measured to have, by the planner.

    slowness of a rank = seconds that it computes in a step / what the units' costs give for its stages

so that predicted times are in seconds, and what the costs do not know (they may be estimates) counts as the rank's. A
split that was tried and was no better is not tried again until the speed of a rank changes: so nothing swings.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate, chain, repeat
from statistics import median

from pipekern.plan.balance import UnitCosts, balance, predicted
from pipekern.runtime.assembly import Assembly
from pipekern.runtime.blueprint import Blueprint, unit_costs
from pipekern.runtime.move import Move
from pipekern.runtime.options import Options
from pipekern.runtime.watch import Watch
from pipekern.schedule.ir import Schedule

EVERY = 5  # steps between two looks
_LEAST = 8  # steps heard of that a judgement needs
_GAIN = 0.05  # of a step, by each group of recent steps, and more than these differ by: less is noise
_HORIZON = 200  # steps within which a move must have paid for itself
_CHANGED = 1.15  # times as long as before, or as short: then all is to be tried anew
_SECONDS, _PER_BYTE = 0.1, 1e-9  # what a move takes, before one has shown it
_STATES = 16  # bytes of a trained number: itself, its gradient, and two moments of Adam

Split = tuple[int, ...]


class Rebalancer:
    """Judges the splits of one pipeline; alike on every rank, for all have heard the same."""

    def __init__(self) -> None:
        self._seconds = _SECONDS
        self._tried: dict[Split, list[float]] = {}  # what ranks computed in a step, by split
        self._refused: set[Split] = set()

    def better(self, parts: Assembly, watch: Watch, options: Options) -> Split | None:
        """Units a stage that pay for the move to them; None where nothing does, or too few steps are heard of."""
        blueprint, schedule = parts.blueprint, parts.blueprint.schedule
        if watch.heard < _LEAST:
            return None
        split = tuple(map(len, blueprint.stages))
        groups = [[sum(row[s] for s in schedule.stages_of(r)) for r in range(schedule.ranks)] for row in watch.groups()]
        busy = list(map(median, zip(*groups, strict=True)))
        self._note(split, busy)
        costs = UnitCosts(*unit_costs(options.split, blueprint.units))
        best = balance(costs, schedule, _slowness(costs, schedule, split, busy))

        def steps(busy: Sequence[float]) -> tuple[float, float]:
            slowness = _slowness(costs, schedule, split, busy)
            return predicted(split, costs, schedule, slowness), predicted(best.split, costs, schedule, slowness)

        (now, then), *others = map(steps, [busy, *groups])
        gains = [1 - after / before for before, after in [(now, then), *others]]
        if min(gains) < max(_GAIN, max(gains) - min(gains)):
            return None
        places = zip(_sizes(blueprint), _homes(schedule, split), _homes(schedule, best.split), strict=True)
        moving = sum(size for size, before, after in places if before != after)
        if (now - then) * _HORIZON < max(self._seconds, _PER_BYTE * moving):
            return None
        if best.split in self._refused or max(self._tried.get(best.split, [0.0])) > (1 - _GAIN) * max(busy):
            return None
        if parts.star.number == 0:
            computing = ", ".join(f"{one * 1e3:.3g}" for one in busy)
            text = "ranks compute %s ms a step; split %s instead of %s should take %.3g ms a step instead of %.3g"
            logging.getLogger("pipekern").info(text, computing, best.split, split, then * 1e3, now * 1e3)
        return best.split

    def _note(self, split: Split, busy: Sequence[float]) -> None:
        before = self._tried.get(split, busy)
        if any(max(a, b) > _CHANGED * min(a, b) for a, b in zip(before, busy, strict=True)):
            self._tried.clear()
            self._refused.clear()
        self._tried.setdefault(split, list(busy))

    def refused(self, split: Split, error: Exception) -> None:
        """Leave ``split`` alone, which cannot be had, until the speed of a rank changes."""
        self._refused.add(split)
        logging.getLogger("pipekern").warning("split %s would be better, and cannot be had: %s", split, error)

    def learn(self, move: Move) -> None:
        """Take from ``move`` how long the next one will take."""
        self._seconds = move.seconds


def _sizes(blueprint: Blueprint) -> list[int]:
    """Bytes of every unit with all that moves with it."""
    return [_STATES * sum(p.numel() for _, p in unit.named_parameters()) for unit in blueprint.units]


def _homes(schedule: Schedule, split: Split) -> list[int]:
    """The rank of every unit."""
    return list(chain.from_iterable(map(repeat, schedule.stage_rank, split)))


def _slowness(costs: UnitCosts, schedule: Schedule, split: Split, busy: Sequence[float]) -> list[float]:
    work = list(map(sum, zip(costs.forward, costs.backward, costs.weight, strict=True)))
    own = [0.0] * schedule.ranks
    for rank, end, size in zip(schedule.stage_rank, accumulate(split), split, strict=True):
        own[rank] += sum(work[end - size : end]) * schedule.microbatches
    least = 1e-9 * max(busy, default=0.0) or 1.0  # of a rank without work, whose speed nobody knows
    return [
        seconds / all_of_it if seconds and all_of_it else least for seconds, all_of_it in zip(busy, own, strict=True)
    ]
