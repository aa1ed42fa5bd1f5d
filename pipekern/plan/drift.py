"""Which of several parts that take the same steps has become slower: a test for a change, over numbers alone.

A part is compared with its own history, and with what all have in common: x is the logarithm of its time over its usual
one, z is x less the (lower) median of all parts' where that is above 0. So a step with more work, or a machine that is
slower as a whole, is nobody's fault. z is summed as in E. S. Page's test (Continuous inspection schemes, Biometrika
1954): S = max(0, S + z - ALLOWANCE), and the part counts as slow from S > BOUND on. One outlier adds at most
CLIP - ALLOWANCE, so that four steps in a row must be slow, and four of 1.5 times or
more are enough. The way back is the same
sum with the other sign.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

SETTLING = 5  # first steps, which are not looked at
LEARNING = 20  # steps after them, whose medians are the usual times
ALLOWANCE = 0.12  # the logarithm of 1.13
CLIP = 0.45
BOUND = 1.0
RECENT = 5  # steps whose median tells how much slower
FLOOR = 0.02  # of the parts' mean time, added to each: nobody waits for a part that takes next to nothing
RATE, PULL = 0.02, 0.1  # the usual time follows by RATE of x, where x counts as PULL at most


class Change(NamedTuple):
    """``part`` has become slow, by ``factor``; or is as before, then ``factor`` is 1."""

    part: int
    factor: float


class Drift:
    """Watches ``parts``, which are numbered from 0. ``slow`` has those that are, with their factors."""

    def __init__(self, parts: int):
        self.slow: dict[int, float] = {}
        self._steps = 0
        self._first: list[Sequence[float]] = []
        self._floor = 0.0
        self._usual = [0.0] * parts
        self._sums = [0.0] * parts
        self._recent: list[deque[float]] = [deque(maxlen=RECENT) for _ in range(parts)]

    def see(self, times: Sequence[float], work: float = 1.0) -> list[Change]:
        """What has changed with a step in which the parts took ``times``, any unit, for ``work`` (samples, tokens)."""
        self._steps += 1
        times = [time / work for time in times]
        if self._steps <= SETTLING:
            return []
        if self._steps <= SETTLING + LEARNING:
            self._first.append(times)
            if len(self._first) == LEARNING:
                self._learn()
            return []
        logs = [math.log(time + self._floor) - usual for time, usual in zip(times, self._usual, strict=True)]
        common = max(0.0, sorted(logs)[(len(logs) - 1) // 2])
        found = [self._judge(part, x, x - common) for part, x in enumerate(logs)] if len(logs) > 1 else []
        return [change for change in found if change is not None]

    def _learn(self) -> None:
        usual = [median(row) for row in zip(*self._first, strict=True)]
        self._floor = FLOOR * sum(usual) / len(usual) or 1.0
        self._usual = [math.log(time + self._floor) for time in usual]
        self._first.clear()

    def _judge(self, part: int, x: float, z: float) -> Change | None:
        recent, was_slow = self._recent[part], part in self.slow
        recent.append(z)
        gain = max(-CLIP, min(CLIP, z)) - ALLOWANCE
        self._sums[part] = max(0.0, self._sums[part] + (-gain if was_slow else gain))
        if was_slow:
            self.slow[part] = math.exp(median(recent))
        else:
            self._usual[part] += RATE * max(-PULL, min(PULL, x))
        if self._sums[part] <= BOUND:
            return None
        self._sums[part] = 0.0
        if was_slow:
            del self.slow[part]
            return Change(part, 1.0)
        self.slow[part] = math.exp(median(recent))
        return Change(part, self.slow[part])
