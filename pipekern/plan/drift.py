"""Which of several parts that take the same steps has become slower: a test for a change, over numbers alone.

A part is compared with its own history, and with what all have in common: x is the logarithm of its time over its usual
one, z is x less the (lower) median of all parts' where that is above 0. So a step with more work, or a machine that is
slower as a whole, is nobody's fault. z is summed as in E. S. Page's test (Continuous inspection schemes, Biometrika
1954): S = max(0, S + z - allowance), and the part counts as slow from S > BOUND + noisy noise on, where noise is the
mean of abs(z). One outlier adds at most clip - allowance. At 1.5 times, a part without noise is found in 4 or 5 steps,
one with a noise of 0.1 in 6. The way back is a sum of allowance - z, of which an outlier adds as much as a usual step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from operator import lt
from statistics import median
from typing import NamedTuple

BOUND = 1.0
BACK = 0.4  # the bound of the way back
DOUBT = 0.2  # a sum that a single step of 1.5 times exceeds
RECENT = 3  # steps whose median tells how much slower
FLOOR = 0.02  # of the parts' mean time, added to each: nobody waits for a part that takes next to nothing
EVERY = 5  # steps of which one tells how noise and the usual time change
RATE, PULL = 0.1, 0.1  # they follow by RATE of what is seen then, where x counts as PULL at most
RISE = 0.2  # the usual time follows up to that much above the first one, so that a slow rise is found as well


class Scale(NamedTuple):
    """Steps at first that are not looked at, steps after them whose medians are the usual times, what logarithms are
    compared with, and how much noise counts.
    """

    settling: int
    learning: int
    allowance: float
    clip: float
    noisy: float


STEPS = Scale(5, 20, 0.12, 0.45, 4.0)  # 0.12 is the logarithm of 1.13
SUMS = Scale(1, 12, 0.25, 0.7, 8.0)  # over several steps, of times that scatter more; the logarithm of 1.28


class Change(NamedTuple):
    """``part`` has become slow, by ``factor``; or is as before, then ``factor`` is 1."""

    part: int
    factor: float


class Drift:
    """Watches ``parts``, which are numbered from 0. ``slow`` has those that are, with their factors; it is ``in_doubt``
    while a few steps more may change that.
    """

    def __init__(self, parts: int, scale: Scale = STEPS):
        self.slow: dict[int, float] = {}
        self.in_doubt = False
        self._settling, self._learning, self._allowance, self._clip, self._noisy = scale
        self._first: list[Sequence[float]] = []
        self._floor = 0.0
        self._usual = [0.0] * parts
        self._most = [0.0] * parts
        self._noise = [0.0] * parts
        self._sums = [0.0] * parts
        self._recent: deque[list[float]] = deque(maxlen=RECENT)
        self._turn = 0  # of EVERY
        self._calm: tuple[float, list[float]] = 0.0, []  # times that change nothing if all are below, for how much work

    def see(self, times: Sequence[float], work: float = 1.0) -> list[Change]:
        """What has changed with a step in which the parts took ``times``, any unit, for ``work`` (samples, tokens)."""
        if self._settling:
            self._settling -= 1
        elif self._learning:
            self._learning -= 1
            self._first.append([time / work for time in times])
            if not self._learning:
                self._learn()
        elif len(times) > 1:
            self._turn = (self._turn + 1) % EVERY
            known, below = self._calm
            if not self._turn or known != work or not all(map(lt, times, below)):
                return self._look([time / work for time in times], work)
        return []

    def _look(self, times: Sequence[float], work: float) -> list[Change]:
        logs = self._logs(times)
        common = _common(logs)
        self._recent.append([x - common for x in logs])
        found = [self._judge(part, x - common) for part, x in enumerate(logs)]
        if not self._turn:
            self._follow(logs, common)
        self.in_doubt = max(self._sums) > DOUBT
        self._calm = 0.0, []
        if not self.slow and not any(self._sums):
            self._calm = work, [work * (math.exp(usual + self._allowance) - self._floor) for usual in self._usual]
        return [change for change in found if change is not None]

    def forget(self, part: int) -> None:
        """``part`` is as fast as before, whatever it seems to be."""
        self.slow.pop(part, None)
        self._sums[part] = 0.0

    def _learn(self) -> None:
        usual = [median(row) for row in zip(*self._first, strict=True)]
        self._floor = FLOOR * sum(usual) / len(usual) or 1.0
        self._usual = [math.log(time + self._floor) for time in usual]
        self._most = [usual + RISE for usual in self._usual]
        for logs in map(self._logs, self._first):
            common = _common(logs)
            for part, x in enumerate(logs):
                self._noise[part] += min(self._clip, abs(x - common)) / len(self._first)
        self._first.clear()

    def _logs(self, times: Sequence[float]) -> list[float]:
        """x of each part."""
        return [math.log(time + self._floor) - usual for time, usual in zip(times, self._usual, strict=True)]

    def _follow(self, logs: Sequence[float], common: float) -> None:
        for part, x in enumerate(logs):
            if part not in self.slow:
                self._usual[part] = min(self._most[part], self._usual[part] + RATE * _within(PULL, x))
                self._noise[part] += RATE * (min(self._clip, abs(x - common)) - self._noise[part])

    def _judge(self, part: int, z: float) -> Change | None:
        z = _within(self._clip, z)
        total = self._sums[part]
        if part in self.slow:
            self.slow[part] = self._factor(part)
            self._sums[part] = max(0.0, total + self._allowance - max(0.0, z))
            if self._sums[part] <= BACK:
                return None
            self.forget(part)
            return Change(part, 1.0)
        self._sums[part] = max(0.0, total + z - self._allowance)
        if self._sums[part] <= BOUND + self._noisy * self._noise[part]:
            return None
        self._sums[part] = 0.0
        self.slow[part] = self._factor(part)
        return Change(part, self.slow[part])

    def _factor(self, part: int) -> float:
        return math.exp(median([row[part] for row in self._recent]))


def _common(logs: Sequence[float]) -> float:
    return max(0.0, sorted(logs)[(len(logs) - 1) // 2])


def _within(bound: float, value: float) -> float:
    return value if -bound < value < bound else math.copysign(bound, value)
