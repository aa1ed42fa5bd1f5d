"""When another split pays: for the speeds that the ranks have been measured to have, by the planner.

    slowness of a rank = seconds that it computes in a step / what the units' costs give for its stages

so that predicted times are in seconds, and what the costs do not know (they may be estimates) counts as the rank's. A
split that was tried and was no better is not tried again until the speed of a rank changes: so nothing swings.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate, chain, repeat

from pipekern.plan.balance import UnitCosts, balance, predicted
from pipekern.runtime.assembly import Assembly
from pipekern.runtime.blueprint import unit_costs
from pipekern.runtime.move import Move
from pipekern.runtime.options import Options
from pipekern.runtime.watch import Watch
from pipekern.schedule.ir import Schedule

EVERY = 5  # steps between two looks
_LEAST = 8  # steps heard of that a judgement needs
_GAIN = 0.05  # of a step: less is noise
_SCATTER = 3  # times what the steps looked at scatter by: less is noise too; with 1 there is a vain move in 1 000 steps
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

    def better(self, parts: Assembly, watch: Watch, options: Options) -> Split | None:
        """Units a stage that pay for the move to them; None where nothing does, or too few steps are heard of."""
        stages = watch.busy()
        if stages is None or watch.heard < _LEAST:
            return None
        blueprint, schedule = parts.blueprint, parts.blueprint.schedule
        split = tuple(map(len, blueprint.stages))
        busy = [sum(stages[stage] for stage in schedule.stages_of(rank)) for rank in range(schedule.ranks)]
        self._note(split, busy)
        costs = UnitCosts(*unit_costs(options.split, blueprint.units))
        slowness = _slowness(costs, schedule, split, busy)
        now, best = predicted(split, costs, schedule, slowness), balance(costs, schedule, slowness)
        sizes = [_STATES * sum(p.numel() for _, p in unit.named_parameters()) for unit in blueprint.units]
        places = zip(sizes, _homes(schedule, split), _homes(schedule, best.split), strict=True)
        seconds = max(self._seconds, _PER_BYTE * sum(size for size, before, after in places if before != after))
        gain = now - best.step
        if gain < max(_GAIN, _SCATTER * watch.scatter) * now or gain * _HORIZON < seconds:
            return None
        if max(self._tried.get(best.split, [0.0])) > (1 - _GAIN) * max(busy):
            return None
        if parts.star.number == 0:
            computing = ", ".join(f"{one * 1e3:.3g}" for one in busy)
            text = "ranks compute %s ms a step; split %s instead of %s should take %.3g ms a step instead of %.3g"
            logging.getLogger("pipekern").info(text, computing, best.split, split, best.step * 1e3, now * 1e3)
        return best.split

    def _note(self, split: Split, busy: Sequence[float]) -> None:
        before = self._tried.get(split, busy)
        if any(max(a, b) > _CHANGED * min(a, b) for a, b in zip(before, busy, strict=True)):
            self._tried.clear()
        self._tried.setdefault(split, list(busy))

    def learn(self, move: Move) -> None:
        """Take from ``move`` how long the next one will take."""
        self._seconds = move.seconds


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
