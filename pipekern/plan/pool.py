"""A row of layers, and devices of a few kinds that may stand in any order: how far stages reach under a limit."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from operator import add, sub
from typing import NamedTuple

State = tuple[int, ...]  # how many devices of each kind are in use


class Reached(NamedTuple):
    """Whether a limit on stages ``may`` do.

    ``edge`` is the least limit that surely has the same answer, where it is yes; else the first that may have another.
    """

    may: bool
    edge: int


@dataclass(frozen=True)
class Pool:
    """``counts`` devices of each kind, ``parts`` of them in use, one a stage.

    ``done[i]`` is the work before layer ``i``, ``cuts[i]`` the cost of a cut there; a stage takes its work times the
    ``factors`` of its kind plus its two cuts. ``held[k]`` is the memory of the layers before each layer at position
    ``k``, ``caps`` that of each kind; both empty where memory does not matter. All are integers.
    """

    parts: int
    counts: Sequence[int]
    done: Sequence[int]
    cuts: Sequence[int]
    factors: Sequence[int]
    held: Sequence[Sequence[int]]
    caps: Sequence[int]

    @property
    def layers(self) -> int:
        return len(self.done) - 1

    @property
    def kinds(self) -> range:
        return range(len(self.counts))

    @property
    def states(self) -> int:
        """How many states there are, over all levels."""
        return math.prod(count + 1 for count in self.counts)

    @cached_property
    def endless(self) -> int:
        """More than any cut's total time, and so than any stage's."""
        return self.done[-1] * max(self.factors) + 2 * sum(self.cuts) + 1

    @property
    def beyond(self) -> int:
        """More than any bound, prices included."""
        return 16 * self.endless * (self.parts + 4)

    def time(self, start: int, end: int, kind: int) -> int:
        """The time of a stage."""
        return (self.done[end] - self.done[start]) * self.factors[kind] + self.cuts[start] + self.cuts[end]

    @cached_property
    def exit(self) -> list[list[int]]:
        """By kind; a stage from a to b fits only where ``entry[b] - exit[a] <= limit``, and both only grow."""
        return [list(accumulate(map(sub, work, self.cuts), max)) for work in self.work]

    @cached_property
    def entry(self) -> list[list[int]]:
        """See :attr:`exit`."""
        rows = (accumulate(map(add, reversed(work), reversed(self.cuts)), min) for work in self.work)
        return [list(row)[::-1] for row in rows]

    @cached_property
    def work(self) -> list[list[int]]:
        """The time of the layers before each layer, by kind."""
        return [[done * factor for done in self.done] for factor in self.factors]


class Limited:
    """What a limit allows: the longest stages of each kind, wherever cuts cost least.

    ``high`` and ``low`` are the last and the first end at which a cut may be, by state; a state is only in them where
    there is one.
    """

    def __init__(self, pool: Pool, limit: int):
        self.pool, self.limit = pool, limit
        self._far: dict[tuple[int, int, int], int] = {}
        self.high = self._forward()
        self.low = self._backward()

    def far(self, level: int, kind: int, start: int) -> int:
        """No stage from ``start`` or before ends later."""
        key = level if self.pool.held else 0, kind, start
        if key not in self._far:
            pool = self.pool
            end = bisect_right(pool.entry[kind], self.limit + pool.exit[kind][start]) - 1
            if pool.held:
                held = pool.held[level - 1]
                end = min(end, bisect_right(held, held[start] + pool.caps[kind]) - 1)
            self._far[key] = end
        return self._far[key]

    def near(self, level: int, kind: int, end: int) -> int:
        """No stage to ``end`` or after starts earlier."""
        pool = self.pool
        start = bisect_left(pool.exit[kind], pool.entry[kind][end] - self.limit)
        if pool.held:
            held = pool.held[level - 1]
            start = max(start, bisect_left(held, held[end] - pool.caps[kind]))
        return start

    def _forward(self) -> dict[State, int]:
        pool = self.pool
        high = {(0,) * len(pool.counts): 0}
        for state in product(*(range(count + 1) for count in pool.counts)):
            level = sum(state)
            if not 1 <= level <= pool.parts:
                continue
            before = ((kind, used(state, kind, -1)) for kind in pool.kinds if state[kind])
            ends = [self.far(level, kind, high[origin]) for kind, origin in before if origin in high]
            end = min(max(ends, default=-1), pool.layers - (pool.parts - level))
            if end >= level:
                high[state] = end
        return high

    def _backward(self) -> dict[State, int]:
        pool = self.pool
        low: dict[State, int] = {}
        for state in sorted(self.high, key=sum, reverse=True):
            level = sum(state)
            if level == pool.parts:
                start = pool.layers
            else:
                after = ((kind, used(state, kind, 1)) for kind in pool.kinds)
                starts = (self.near(level + 1, kind, low[target]) for kind, target in after if target in low)
                start = max(level, min(starts, default=pool.layers + 1))
            if start <= self.high[state]:
                low[state] = start
        return low

    @property
    def may(self) -> bool:
        """Necessary for a cut with such stages, not sufficient: as if stages could be empty."""
        return (0,) * len(self.pool.counts) in self.low

    def reached(self) -> Reached:
        """With the limit at which the answer may change."""
        edges = [
            entry[end] - start
            for kind in self.pool.kinds
            for entry in [self.pool.entry[kind]]
            for start in self.pool.exit[kind]
            for end in [bisect_right(entry, self.limit + start) - self.may]
            if 0 <= end <= self.pool.layers
        ]
        if self.may:
            return Reached(True, max(edges, default=self.limit))
        return Reached(False, min(edges, default=self.pool.beyond))


def used(state: State, kind: int, more: int) -> State:
    """With ``more`` devices of a kind in use."""
    return (*state[:kind], state[kind] + more, *state[kind + 1 :])
