"""Where the time of every step goes, and which stage has become slow.

Numbers travel with the flags by which all ranks agree at the end of a step, so that nobody waits for them.

Two times of a stage are judged. What its fastest micro-batch of a step takes, times their number, has next to no noise:
what interrupts one (another process, a garbage collection) does not show. But a neighbour on the same core, or a quota
of its time, is nothing but interruptions: so sums are judged as well, over several steps, for they scatter.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import itemgetter
from statistics import fmean, median
from typing import Any

from pipekern.plan.drift import SUMS, Drift
from pipekern.runtime.assembly import Assembly
from pipekern.runtime.batch import Batch
from pipekern.runtime.executor import Placed
from pipekern.runtime.stats import RankStats, Stats
from pipekern.runtime.ticks import Clock, Lap
from pipekern.schedule.comms import RECEIVES
from pipekern.trace.timeline import COMPUTE
from pipekern.transport.value import tensors

BLOCK = 5  # steps whose sums are judged together, and that are told at once: several cost hardly more than one
GROUPS = 3  # of as many steps, of whose means the median is told
_UNREAD = 64  # steps that are kept for an exchange at most


class Watch:
    """Watches the steps of ``parts``. ``slow`` has the stages that have become slower than they were, by (rank of the
    job, stage): how many times; the same on every rank.
    """

    def __init__(self, parts: Assembly):
        self._parts = parts
        self._clock = Clock(parts.train, {index: stage.device for index, stage in parts.stages.items()})
        schedule, star = parts.blueprint.schedule, parts.star
        own = range(schedule.ranks) if star.rank is None else [star.rank]
        self._sorted = {rank: _by_kind(parts.train.placed, rank) for rank in own}
        self._works = [
            [_taker(where) for (s, kind), where in kinds.items() if s == stage and kind in COMPUTE]
            for rank, kinds in self._sorted.items()
            for stage in schedule.stages_of(rank)
        ]
        self._recent: deque[tuple[list[int], int]] = deque(maxlen=GROUPS * BLOCK)
        self._unread: deque[tuple[int, Lap]] = deque(maxlen=_UNREAD)
        self._steps = 0
        self._due = False  # whether this step's numbers are told, on all ranks
        ranks = [(pipeline, rank) for pipeline in range(star.pipelines) for rank in range(schedule.ranks)]
        self._watched = [
            (pipeline * schedule.ranks + rank, stage) for pipeline, rank in ranks for stage in schedule.stages_of(rank)
        ]
        processes = [len(self._watched)] if star.rank is None else [len(schedule.stages_of(rank)) for _, rank in ranks]
        self._widths = [1 + 2 * stages for stages in processes]
        self._told: list[deque[list[int]]] = [deque() for _ in processes]
        self._fastest = Drift(len(self._watched))
        self._sums = Drift(len(self._watched), SUMS)
        self.slow: dict[tuple[int, int], float] = {}
        self._block: list[list[int]] = []  # sums of the block that is not yet full, each step's after its work
        self._heard: deque[list[int]] = deque(maxlen=GROUPS * BLOCK)  # such rows of recent steps

    @property
    def heard(self) -> int:
        """Of how many recent steps :meth:`groups` tells."""
        return len(self._heard)

    def groups(self) -> list[list[float]]:
        """For each of GROUPS groups of recent steps the seconds a step that each stage of the schedule computes, of
        replicas the slowest; the same numbers on every rank. Empty until five steps are heard of since the start, or
        since a stage became slow or fast again.
        """
        if len(self._heard) < BLOCK:
            return []
        _, *columns = zip(*self._heard, strict=True)
        found = []
        for means in zip(*map(_means, columns), strict=True):
            stages = [0.0] * self._parts.blueprint.schedule.stages
            for (_, stage), nanoseconds in zip(self._watched, means, strict=True):
                stages[stage] = max(stages[stage], nanoseconds / 1e9)
            found.append(stages)
        return found

    def note(self, batch: Batch) -> None:
        """Take the clocks of the step on ``batch`` that has just run."""
        work = 0 if batch.inputs is None else sum(tensor.numel() for tensor in tensors(batch.inputs[0]))
        self._unread.append((work, self._clock.take()))
        self._steps += 1

    def tell(self) -> str:
        """For all ranks: what this one has noted of steps that its devices are past, once it is enough to be worth the
        time, or at once where a stage may be slow. For :meth:`hear`.
        """
        self._due = self._steps % BLOCK == 0 or self._fastest.in_doubt
        return self._numbers() if self._due else ""

    def _numbers(self) -> str:
        numbers: list[int] = []
        while self._unread and self._unread[0][1].done():
            work, lap = self._unread.popleft()
            spent, whole = self._clock.read(lap)
            self._recent.append((spent, whole))
            numbers.append(work)
            for kinds in self._works:
                rows = [take(spent) for take in kinds]
                numbers += sum([min(row) * len(row) for row in rows]), sum(map(sum, rows))
        return " ".join(map(str, numbers))

    def _all_numbers(self) -> str:
        for _, lap in self._unread:
            lap.wait()
        return self._numbers()

    def hear(self, told: Sequence[str]) -> None:
        """Judge what all processes of the job have told, in their order; each text has one character before it."""
        if self._due:
            self._take(told)

    def _take(self, told: Sequence[str]) -> None:
        for text, width, steps in zip(told, self._widths, self._told, strict=True):
            numbers = list(map(int, text[1:].split()))
            steps.extend(numbers[at : at + width] for at in range(0, len(numbers), width))
        while all(self._told):
            self._judge([steps.popleft() for steps in self._told])

    def _judge(self, rows: Sequence[Sequence[int]]) -> None:
        """One step; of each process its work, and of each stage what its fastest micro-batches and all of them take."""
        work = sum([row[0] for row in rows])
        changes = self._fastest.see([time for row in rows for time in row[1::2]], work or 1)
        for part, factor in changes:
            if factor == 1.0:
                self._sums.forget(part)
        self._block.append([work, *[time for row in rows for time in row[2::2]]])
        self._heard.append(self._block[-1])
        if len(self._block) == BLOCK:
            work, *sums = map(sum, zip(*self._block, strict=True))
            changes += self._sums.see(sums, work or 1)
            self._block.clear()
        if changes:
            self._say()
        elif self.slow:
            self.slow = self._slow()

    def _slow(self) -> dict[tuple[int, int], float]:
        both = self._fastest.slow, self._sums.slow
        return {self._watched[part]: max(slow.get(part, 1.0) for slow in both) for part in sorted(set().union(*both))}

    def _say(self) -> None:
        """What has become slow and what is no longer; the steps until then tell nothing of those to come."""
        self._block.clear()
        self._heard.clear()
        before, self.slow = self.slow, self._slow()
        if self._parts.star.number:
            return
        log, step = logging.getLogger("pipekern"), self._steps - 1 - len(self._told[0])
        for rank, stage in before.keys() - self.slow.keys():
            log.info("step %d: stage %d (rank %d) is as fast as before", step, stage, rank)
        for rank, stage in self.slow.keys() - before.keys():
            text = "step %d: stage %d (rank %d) has become %.2f times slower than it was, the others have not"
            log.warning(text, step, stage, rank, self.slow[rank, stage])

    def exchange(self) -> None:
        """Tell and hear all that has not been told yet; collective."""
        everywhere = self._parts.star.everywhere(" " + self._all_numbers())
        self._take([text for pipeline in everywhere for text in pipeline])

    def stats(self) -> Stats:
        """Of recent steps; collective."""
        everywhere = self._parts.star.everywhere([" " + self._all_numbers(), self._smooth()])
        self._take([text for pipeline in everywhere for text, _ in pipeline])
        ranks = tuple(_stats(*rank) for pipeline in everywhere for _, own in pipeline for rank in own)
        return Stats(ranks, self._steps, dict(self.slow))

    def _smooth(self) -> list[list[Any]]:
        """Of each rank here: (stage, kind, seconds) of what it does, and seconds from its first clock to its last."""
        recent = list(self._recent) or [([0] * len(self._parts.train.placed), 0)]

        def seconds(where: Sequence[int]) -> float:
            return _median_of_means([sum(spent[i] for i in where) for spent, _ in recent]) / 1e9

        step = _median_of_means([whole for _, whole in recent]) / 1e9
        return [[[(*key, seconds(where)) for key, where in row.items()], step] for row in self._sorted.values()]


def _by_kind(placed: Sequence[Placed], rank: int) -> dict[tuple[int, str], list[int]]:
    """Where in ``placed`` the instructions of ``rank`` are, by stage and kind."""
    found: dict[tuple[int, str], list[int]] = {}
    for i, (owner, one) in enumerate(placed):
        if owner == rank:
            kind = one.op if one.op in COMPUTE else "waiting" if one.op in (*RECEIVES, "JOIN") else "sending"
            found.setdefault((one.stage, kind), []).append(i)
    return found


def _taker(where: Sequence[int]) -> Callable[[list[int]], tuple[int, ...]]:
    """What takes the values at ``where``."""
    return itemgetter(*where) if len(where) > 1 else lambda spent: (spent[where[0]],)


def _means(values: Sequence[float]) -> list[float]:
    """Of GROUPS groups of neighbours."""
    ends = [len(values) * group // GROUPS for group in range(GROUPS + 1)]
    return [fmean(values[start:end]) for start, end in pairwise(ends) if start < end]


def _median_of_means(values: Sequence[float]) -> float:
    """What comes now and then counts, one stray does not."""
    return median(_means(values))


def _stats(rows: Sequence[tuple[int, str, float]], step: float) -> RankStats:
    stages: dict[int, dict[str, float]] = {}
    other = {"waiting": 0.0, "sending": 0.0}
    for stage, kind, seconds in sorted(rows, key=lambda row: row[0]):
        if kind in COMPUTE:
            stages.setdefault(stage, {})[kind] = seconds
        else:
            other[kind] += seconds
    return RankStats(stages, other["waiting"], other["sending"], step)
