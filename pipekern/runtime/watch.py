"""Where the time of every step goes, and which stage has become slow.

The clocks are those that the executor keeps anyway, of the host: on a CUDA device they tell how long a stage's work takes
to queue, and to wait for where it must. Every step's numbers travel with the flags by which all ranks agree at its end.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from pipekern.plan.drift import Drift
from pipekern.runtime.assembly import Assembly
from pipekern.runtime.batch import Batch
from pipekern.runtime.stats import RankStats, Stats
from pipekern.schedule.comms import RECEIVES
from pipekern.trace.timeline import COMPUTE
from pipekern.transport.value import tensors

_RECENT = 15  # steps whose medians are told
_UNHEARD = 64  # steps that wait for an exchange at most

Row = list[int]  # of a process and a step: entries of its first micro-batch's inputs, then nanoseconds by stage


class Watch:
    """Watches the steps of ``parts``."""

    def __init__(self, parts: Assembly):
        self._parts = parts
        schedule, star = parts.blueprint.schedule, parts.star
        self._here = list(range(schedule.ranks)) if star.rank is None else [star.rank]
        self._stages = [schedule.stages_of(rank) for rank in range(schedule.ranks)]
        self._keys = self._buckets()
        place = {key: i for i, key in enumerate(self._keys)}
        self._into = [place[rank, i.stage, _kind(i.op)] for rank, i in parts.train.placed]
        self._computing = [(rank, stage) for rank in self._here for stage in self._stages[rank]]
        stages = {key: i for i, key in enumerate(self._computing)}
        self._busy = [(i, stages[rank, stage]) for i, (rank, stage, op) in enumerate(self._keys) if op in COMPUTE]
        self._recent: deque[tuple[list[int], int]] = deque(maxlen=_RECENT)
        self._unheard: deque[Row] = deque(maxlen=_UNHEARD)
        self._steps = 0
        self._watched = [
            (pipeline * schedule.ranks + rank, stage)
            for pipeline in range(star.pipelines)
            for rank in range(schedule.ranks)
            for stage in self._stages[rank]
        ]
        self._drift = Drift(len(self._watched))

    def _buckets(self) -> list[tuple[int, int, str]]:
        """Rank, stage and kind of all instructions here, each once."""
        return list(dict.fromkeys((rank, i.stage, _kind(i.op)) for rank, i in self._parts.train.placed))

    def note(self, batch: Batch) -> list[Row]:
        """Add up the clocks of the step on ``batch`` that has just run; what the other ranks have not heard."""
        times = self._parts.train.times
        sums = [0] * len(self._keys)
        for i, (start, end) in zip(self._into, pairwise(times), strict=True):
            sums[i] += end - start
        row = [0] * len(self._computing)
        for i, stage in self._busy:
            row[stage] += sums[i]
        self._recent.append((sums, times[-1] - times[0]))
        self._unheard.append([0 if batch.inputs is None else sum(t.numel() for t in tensors(batch.inputs[0])), *row])
        self._steps += 1
        return list(self._unheard)

    def hear(self, rows: Sequence[Sequence[Sequence[Row]]]) -> None:
        """Judge what all ranks have noted, by pipeline and rank."""
        self._unheard.clear()
        for step in zip(*(row for pipeline in rows for row in pipeline), strict=True):
            work = sum(row[0] for row in step) or 1
            for part, factor in self._drift.see([time for row in step for time in row[1:]], work):
                self._say(*self._watched[part], factor)

    def _say(self, rank: int, stage: int, factor: float) -> None:
        if self._parts.star.number:
            return
        log = logging.getLogger("pipekern")
        if factor == 1.0:
            log.info("step %d: stage %d (rank %d) is as fast as before", self._steps, stage, rank)
        else:
            text = "step %d: stage %d (rank %d) has become %.2f times slower than it was, the others have not"
            log.warning(text, self._steps, stage, rank, factor)

    def stats(self) -> Stats:
        """Of recent steps; collective."""
        everywhere = self._parts.star.everywhere([list(self._unheard), self._medians()])
        self.hear([[unheard for unheard, _ in pipeline] for pipeline in everywhere])
        ranks = [rank for pipeline in everywhere for _, own in pipeline for rank in own]
        slow = {self._watched[part]: factor for part, factor in self._drift.slow.items()}
        return Stats(tuple(_stats(*rank) for rank in ranks), self._steps, slow)

    def _medians(self) -> list[list[Any]]:
        """Of each rank here: its (stage, kind, seconds), and its step."""
        sums = [median(row) / 1e9 for row in zip(*(sums for sums, _ in self._recent), strict=True)] or [0.0] * len(self._keys)
        step = median([step for _, step in self._recent] or [0]) / 1e9
        rows = list(zip(self._keys, sums, strict=True))
        return [[[(s, kind, t) for (r, s, kind), t in rows if r == rank], step] for rank in self._here]


def _kind(op: str) -> str:
    if op in COMPUTE:
        return op
    return "waiting" if op in RECEIVES or op == "JOIN" else "sending"


def _stats(rows: Sequence[tuple[int, str, float]], step: float) -> RankStats:
    stages: dict[int, dict[str, float]] = {}
    other = {"waiting": 0.0, "sending": 0.0}
    for stage, kind, seconds in rows:
        if kind in COMPUTE:
            stages.setdefault(stage, {})[kind] = seconds
        else:
            other[kind] += seconds
    return RankStats(dict(sorted(stages.items())), other["waiting"], other["sending"], step)
