"""All cuts of a row of layers for devices in a fixed order, and bounds on those whose stages stay under a limit.

Level ``k`` of the lattice is what is in use after ``k`` stages: one node. A step to the next one gives a stage to a
device. Devices in any order are in :mod:`pipekern.plan.pool`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import add, sub
from typing import NamedTuple


class Node(NamedTuple):
    """``steps`` that lead here: (node of the level before, device); ``left`` counts the devices not used yet."""

    steps: list[tuple[int, int]]
    left: tuple[int, ...]


Levels = list[list[Node]]


def fixed_order(parts: int) -> Levels:
    """One node a level: stage ``k`` has device ``k``."""
    levels = [[Node([], (1,) * parts)]]
    for stage in range(parts):
        levels.append([Node([(0, stage)], (0,) * (stage + 1) + (1,) * (parts - stage - 1))])
    return levels


class _Reach(NamedTuple):
    """How far stages of one speed go, cuts included: from ``a`` to ``b`` fits where ``entry[b] - exit[a] <= limit``.

    Exact for the ``a`` and ``b`` at which the running maximum of ``exit`` and minimum of ``entry`` change, and a bound
    at the others; both only grow, so that they can be searched.
    """

    exit: list[int]
    entry: list[int]

    @classmethod
    def of(cls, done: Sequence[int], cuts: Sequence[int], factor: int) -> _Reach:
        work = [d * factor for d in done]
        exits = list(accumulate(map(sub, work, cuts), max))
        entries = list(accumulate(map(add, reversed(work), reversed(cuts)), min))
        return cls(exits, entries[::-1])


class Filling(NamedTuple):
    """The least time in which devices do an amount of work, if it could be split at will: the fastest do all they can.

    ``work[i]`` is what the ``i`` fastest kinds can do under the limit, ``time[i]`` how long that takes them.
    """

    work: list[int]
    time: list[int]
    factors: list[int]

    @classmethod
    def of(cls, devices: Iterable[tuple[int, int]], limit: int) -> Filling:
        """``devices`` as (factor, count), the fastest first."""
        work, time, factors = [0], [0], []
        for factor, count in devices:
            share = limit // factor * count
            work.append(work[-1] + share)
            time.append(time[-1] + share * factor)
            factors.append(factor)
        return cls(work, time, factors)

    def least(self, amount: int) -> int:
        """The time of ``amount``; beyond what all can do, at the pace of the slowest."""
        kind = min(bisect_right(self.work, amount), len(self.factors)) - 1
        return self.time[kind] + (amount - self.work[kind]) * self.factors[kind] if amount else 0


Windows = list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Lattice:
    """All cuts of a row of layers.

    ``done[i]`` is the work before layer ``i``, ``cuts[i]`` the cost of a cut there; a stage takes its work times the
    ``factors`` of its device plus its two cuts. ``held[k]`` is the memory of the layers before each layer at position
    ``k``, ``caps`` that of every device; both empty where memory does not matter. All are integers.
    """

    levels: Levels
    done: Sequence[int]
    cuts: Sequence[int]
    factors: Sequence[int]
    held: Sequence[Sequence[int]]
    caps: Sequence[int]

    @property
    def layers(self) -> int:
        return len(self.done) - 1

    @property
    def parts(self) -> int:
        return len(self.levels) - 1

    @cached_property
    def endless(self) -> int:
        """More than any cut's total time, and so than any stage's."""
        return self.done[-1] * max(self.factors) + 2 * sum(self.cuts) + 1

    def time(self, start: int, end: int, device: int) -> int:
        """The time of a stage."""
        return (self.done[end] - self.done[start]) * self.factors[device] + self.cuts[start] + self.cuts[end]

    def least_total(self, limit: int) -> int:
        """No cut with stages of at most ``limit`` has a smaller total."""
        return self.filling(0, 0, limit).least(self.done[-1]) + self.least_cuts[0]

    def windows(self, limit: int) -> Windows:
        """For every node, bounds on the ends of stages of at most ``limit``, as if stages could be empty.

        Empty where no cut has such stages.
        """
        high = self._highest(limit)
        if not high:
            return []
        low = [[self.layers + 1] * len(level) for level in self.levels]
        low[-1] = [self.layers] * len(low[-1])
        for k in range(self.parts, 0, -1):
            for node, (steps, _) in enumerate(self.levels[k]):
                if low[k][node] <= high[k][node]:
                    for before, device in steps:
                        start = max(k - 1, self.near(k, low[k][node], device, limit))
                        low[k - 1][before] = min(low[k - 1][before], start)
        if low[0][0] > 0:
            return []
        return [list(zip(lows, highs, strict=True)) for lows, highs in zip(low, high, strict=True)]

    def _highest(self, limit: int) -> list[list[int]]:
        """The last end of every node (-1: none); empty where the model's end cannot be reached."""
        high = [[0]]
        for k in range(1, self.parts + 1):
            most = self.layers - (self.parts - k)
            reach = [
                max((self.far(k, high[-1][node], device, limit) for node, device in steps), default=-1)
                for steps, _ in self.levels[k]
            ]
            high.append([min(end, most) if end >= k else -1 for end in reach])
            if max(high[-1]) < 0:
                return []
        return high

    @cached_property
    def _reach(self) -> dict[int, _Reach]:
        return {factor: _Reach.of(self.done, self.cuts, factor) for factor in set(self.factors)}

    def far(self, k: int, start: int, device: int, limit: int) -> int:
        """No stage from ``start`` or before ends later; -1 from nowhere."""
        if start < 0:
            return -1
        reach = self._reach[self.factors[device]]
        end = bisect_right(reach.entry, limit + reach.exit[start]) - 1
        if self.held:
            held = self.held[k - 1]
            end = min(end, bisect_right(held, held[start] + self.caps[device]) - 1)
        return end

    def near(self, k: int, end: int, device: int, limit: int) -> int:
        """No stage to ``end`` or after starts earlier."""
        reach = self._reach[self.factors[device]]
        start = bisect_left(reach.exit, reach.entry[end] - limit)
        if self.held:
            held = self.held[k - 1]
            start = max(start, bisect_left(held, held[end] - self.caps[device]))
        return start

    def filling(self, k: int, node: int, limit: int) -> Filling:
        """What the devices that are left after a node can do."""
        return Filling.of(self.left[k][node], limit)

    @cached_property
    def left(self) -> list[list[list[tuple[int, int]]]]:
        """For every node, (factor, count) of the devices that are left, the fastest first."""
        return [[self._grouped(node.left) for node in level] for level in self.levels]

    def _grouped(self, left: Sequence[int]) -> list[tuple[int, int]]:
        counts: Counter[int] = Counter()
        for factor, count in zip(self.factors, left, strict=True):
            counts[factor] += count
        return sorted((factor, count) for factor, count in counts.items() if count)

    @cached_property
    def least_cuts(self) -> list[int]:
        """After each level, what the cuts that are still to come cost at least, but for the one where it ends."""
        ahead = [0, *accumulate(2 * cut for cut in sorted(self.cuts[1:-1])[: self.parts - 1])]
        last = self.cuts[-1]
        return [ahead[-1] + self.cuts[0] + last, *(ahead[left] + last for left in range(self.parts - 2, -1, -1)), 0]
