"""Which of several parts that take the same steps has become slower: a test for a change, over numbers alone.

A part is compared with its own history, and with what all have in common: x is the logarithm of its time over its usual
one, z is x less the (lower) median of all parts' where that is above 0. So a step with more work, or a machine that is
slower as a whole, is nobody's fault. z is summed as in E. S. Page's test (Continuous inspection schemes, Biometrika
1954): S = max(0, S + z - allowance), and the part counts as slow from S > BOUND + NOISY noise on, where noise is the
mean of abs(z). One outlier adds at most clip - allowance. At 1.5 times, a part without noise is found in 4 steps, one
with a noise of 0.1 in 5. The way back is a sum of allowance - z, to which an outlier adds no more than a usual step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

BOUND, NOISY = 0.75, 5.0
BACK = 0.4  # the bound of the way back
DOUBT = 0.2  # a sum that a single step of 1.5 times exceeds
RECENT = 5  # steps whose median tells how much slower
FLOOR = 0.02  # of the parts' mean time, added to each: nobody waits for a part that takes next to nothing
RATE, PULL = 0.02, 0.1  # noise and the usual time follow by RATE of what is seen, where x counts as PULL at most
RISE = 0.2  # the usual time follows up to that much above the first one, so that a slow rise is found as well


class Scale(NamedTuple):
    """Steps at first that are not looked at, steps after them whose medians are the usual times, and what the
    logarithms are compared with.
    """

    settling: int
    learning: int
    allowance: float
    clip: float


STEPS = Scale(5, 20, 0.12, 0.45)  # 0.12 is the logarithm of 1.13
SUMS = Scale(1, 12, 0.25, 0.7)  # over several steps, of times that scatter more; the logarithm of 1.28


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
        self._settling, self._learning, self._allowance, self._clip = scale
        self._first: list[Sequence[float]] = []
        self._floor = 0.0
        self._usual = [0.0] * parts
        self._most = [0.0] * parts
        self._noise = [0.0] * parts
        self._sums = [0.0] * parts
        self._recent: deque[list[float]] = deque(maxlen=RECENT)

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
            floor = self._floor
            logs = [math.log(time / work + floor) - usual for time, usual in zip(times, self._usual, strict=True)]
            common = _common(logs)
            self._recent.append([x - common for x in logs])
            found = [self._judge(part, x, x - common) for part, x in enumerate(logs)]
            self.in_doubt = max(self._sums) > DOUBT
            return [change for change in found if change is not None]
        return []

    def forget(self, part: int) -> None:
        """``part`` is as fast as before, whatever it seems to be."""
        self.slow.pop(part, None)
        self._sums[part] = 0.0

    def _learn(self) -> None:
        usual = [median(row) for row in zip(*self._first, strict=True)]
        self._floor = FLOOR * sum(usual) / len(usual) or 1.0
        self._usual = [math.log(time + self._floor) for time in usual]
        self._most = [usual + RISE for usual in self._usual]
        for times in self._first:
            logs = [math.log(time + self._floor) - usual for time, usual in zip(times, self._usual, strict=True)]
            common = _common(logs)
            for part, x in enumerate(logs):
                self._noise[part] += min(self._clip, abs(x - common)) / len(self._first)
        self._first.clear()

    def _judge(self, part: int, x: float, z: float) -> Change | None:
        z = _within(self._clip, z)
        total = self._sums[part]
        if part in self.slow:
            self.slow[part] = self._factor(part)
            self._sums[part] = max(0.0, total + self._allowance - max(0.0, z))
            if self._sums[part] <= BACK:
                return None
            self.forget(part)
            return Change(part, 1.0)
        self._usual[part] = min(self._most[part], self._usual[part] + RATE * _within(PULL, x))
        self._noise[part] += RATE * (abs(z) - self._noise[part])
        if z <= self._allowance and not total:
            return None
        self._sums[part] = max(0.0, total + z - self._allowance)
        if self._sums[part] <= BOUND + NOISY * self._noise[part]:
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
