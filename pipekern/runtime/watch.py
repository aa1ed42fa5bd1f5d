"""Where the time of every step goes, and which stage has become slow.

The clocks are those that the executor keeps anyway, of the host: on a CUDA device they tell how long a stage's work
takes to queue, and to wait for where it must. Numbers travel with the flags by which all ranks agree at the end of a
step, so that nobody waits for them.

A stage is judged by the median of its micro-batches: what interrupts one (another process, a garbage collection) is not
the stage's speed. ``Stats`` has sums.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Sequence
from operator import sub
from statistics import median
from typing import Any

from pipekern.plan.drift import Drift
from pipekern.runtime.assembly import Assembly
from pipekern.runtime.batch import Batch
from pipekern.runtime.executor import Placed
from pipekern.runtime.stats import RankStats, Stats
from pipekern.schedule.comms import RECEIVES
from pipekern.trace.timeline import COMPUTE
from pipekern.transport.value import tensors

_RECENT = 15  # steps whose medians are told
_LEAST = 5  # heard steps without which there is no median
_UNHEARD = 64  # steps that are kept for an exchange at most
TOGETHER = 3  # steps that are told at once: an exchange costs as much for several as for one


class Watch:
    """Watches the steps of ``parts``."""

    def __init__(self, parts: Assembly):
        self._parts = parts
        schedule, star = parts.blueprint.schedule, parts.star
        own = range(schedule.ranks) if star.rank is None else [star.rank]
        self._sorted = {rank: _by_kind(parts.train.placed, rank) for rank in own}
        self._works = [
            [where for (s, kind), where in kinds.items() if s == stage and kind in COMPUTE]
            for rank, kinds in self._sorted.items()
            for stage in schedule.stages_of(rank)
        ]
        self._recent: deque[tuple[list[int], int]] = deque(maxlen=_RECENT)
        self._unheard: deque[tuple[int, tuple[int, ...]]] = deque(maxlen=_UNHEARD)
        self._steps = 0
        self._watched = [
            (pipeline * schedule.ranks + rank, stage)
            for pipeline in range(star.pipelines)
            for rank in range(schedule.ranks)
            for stage in schedule.stages_of(rank)
        ]
        self._drift = Drift(len(self._watched))
        self._heard: deque[list[int]] = deque(maxlen=_RECENT)

    @property
    def slow(self) -> dict[tuple[int, int], float]:
        """The stages that have become slower than they were, by (rank of the job, stage): how many times; the same on
        every rank.
        """
        return {self._watched[part]: factor for part, factor in self._drift.slow.items()}

    @property
    def heard(self) -> int:
        """Of how many recent steps :meth:`busy` is the median."""
        return len(self._heard)

    def busy(self) -> list[float] | None:
        """Seconds a step that each stage of the schedule computes, of replicas the slowest: medians of recent steps,
        the same numbers on every rank. None until enough steps are heard of.
        """
        if len(self._heard) < _LEAST:
            return None
        stages = [0.0] * self._parts.blueprint.schedule.stages
        for (_, stage), times in zip(self._watched, zip(*self._heard, strict=True), strict=True):
            stages[stage] = max(stages[stage], median(times) / 1e9)
        return stages

    def note(self, batch: Batch) -> None:
        """Take the clocks of the step on ``batch`` that has just run."""
        work = 0 if batch.inputs is None else sum(tensor.numel() for tensor in tensors(batch.inputs[0]))
        self._unheard.append((work, tuple(self._parts.train.times)))
        self._steps += 1

    def tell(self) -> str:
        """For all ranks: what this one has noted, once it is enough to be worth an exchange. For :meth:`hear`."""
        return self._rows() if len(self._unheard) >= TOGETHER else ""

    def _rows(self) -> str:
        rows = []
        for work, times in self._unheard:
            spent = list(map(sub, times[1:], times))
            rows.append([work, *(sum(_typical(spent, where) for where in kinds) for kinds in self._works)])
            self._recent.append((spent, times[-1] - times[0]))
        self._unheard.clear()
        return json.dumps(rows)

    def hear(self, told: Sequence[str]) -> None:
        """Judge what all processes of the job have told, in their order; each text has one character before it."""
        if len(told[0]) == 1:
            return
        rows = [json.loads(text[1:]) for text in told]
        for number, step in enumerate(zip(*rows, strict=True)):
            work = sum(row[0] for row in step) or 1
            times = [time for row in step for time in row[1:]]
            self._heard.append(times)
            for part, factor in self._drift.see(times, work):
                self._say(self._steps - len(rows[0]) + number, *self._watched[part], factor)

    def _say(self, step: int, rank: int, stage: int, factor: float) -> None:
        if self._parts.star.number:
            return
        log = logging.getLogger("pipekern")
        if factor == 1.0:
            log.info("step %d: stage %d (rank %d) is as fast as before", step, stage, rank)
        else:
            text = "step %d: stage %d (rank %d) has become %.2f times slower than it was, the others have not"
            log.warning(text, step, stage, rank, factor)

    def exchange(self) -> None:
        """Tell and hear all that has not been told yet; collective."""
        told = self._parts.star.everywhere(" " + self._rows())
        self.hear([text for pipeline in told for text in pipeline])

    def stats(self) -> Stats:
        """Of recent steps; collective."""
        everywhere = self._parts.star.everywhere([" " + self._rows(), self._medians()])
        self.hear([text for pipeline in everywhere for text, _ in pipeline])
        ranks = tuple(_stats(*rank) for pipeline in everywhere for _, own in pipeline for rank in own)
        return Stats(ranks, self._steps, self.slow)

    def _medians(self) -> list[list[Any]]:
        """Of each rank here: (stage, kind, seconds) of what it does, and seconds from its first clock to its last."""
        recent = self._recent or [([0] * len(self._parts.train.placed), 0)]
        step = median(whole for _, whole in recent) / 1e9

        def seconds(where: Sequence[int]) -> float:
            return median(sum(spent[i] for i in where) for spent, _ in recent) / 1e9

        return [[[(*key, seconds(where)) for key, where in row.items()], step] for row in self._sorted.values()]


def _by_kind(placed: Sequence[Placed], rank: int) -> dict[tuple[int, str], list[int]]:
    """Where in ``placed`` the instructions of ``rank`` are, by stage and kind."""
    found: dict[tuple[int, str], list[int]] = {}
    for i, (owner, one) in enumerate(placed):
        if owner == rank:
            kind = one.op if one.op in COMPUTE else "waiting" if one.op in (*RECEIVES, "JOIN") else "sending"
            found.setdefault((one.stage, kind), []).append(i)
    return found


def _typical(spent: Sequence[int], where: Sequence[int]) -> int:
    """What the instructions ``where`` would take if each took their median: one that was interrupted does not show."""
    return sorted(map(spent.__getitem__, where))[(len(where) - 1) // 2] * len(where)


def _stats(rows: Sequence[tuple[int, str, float]], step: float) -> RankStats:
    stages: dict[int, dict[str, float]] = {}
    other = {"waiting": 0.0, "sending": 0.0}
    for stage, kind, seconds in sorted(rows, key=lambda row: row[0]):
        if kind in COMPUTE:
            stages.setdefault(stage, {})[kind] = seconds
        else:
            other[kind] += seconds
    return RankStats(stages, other["waiting"], other["sending"], step)
