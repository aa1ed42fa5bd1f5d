"""The best cut for devices in any order: by its slowest stage, or by the time of a whole step; with a proven bound."""

from __future__ import annotations

import heapq
import math
from fractions import Fraction
from typing import NamedTuple

from pipekern.plan.lattice import Filling
from pipekern.plan.pool import Pool
from pipekern.plan.solver import Solver
from pipekern.plan.table import Cut

_MOST = 1_000_000_000  # of Solver.spent: then a search stops, that for the bottleneck after half of it


class Best(NamedTuple):
    """``cut`` is None where none fits; ``value`` is its bottleneck, or step, and no cut has less than ``least``."""

    cut: Cut | None
    value: int
    least: int

    @property
    def gap(self) -> float:
        """By how much of the least the value may be too large."""
        if self.value <= self.least:
            return 0.0
        return self.value / self.least - 1 if self.least > 0 else math.inf


def smallest_bottleneck(solver: Solver) -> Best:
    """The cut whose longest stage is shortest, and one of the smallest totals among those if it is proven to be.

    By bisection: first over what would do if stages could be empty and cuts cost least, then over what does.
    """
    pool = solver.pool
    low = _reachable(solver)
    if low is None:
        return Best(None, 0, 0)
    found = solver.cheapest(low, pool.endless)
    best, floor, step = found.cut, low, max(1, low >> 12)
    if best is None and found.least >= pool.endless:
        floor = low + 1
    low += 1
    while best is None:
        if low > pool.endless:
            return Best(None, 0, 0)
        found = solver.cheapest(low + step, pool.endless)
        best, low, step = found.cut, low + step + 1, 2 * step
        if best is None and found.least >= pool.endless:
            floor = low
    low = floor
    while low < best.longest and solver.spent < _MOST // 2:
        middle = (low + best.longest - 1) // 2
        found = solver.cheapest(middle, pool.endless)
        if found.cut is not None:
            best = found.cut
        else:
            low = middle + 1
            floor = low if found.least >= pool.endless else floor
    return Best(best, best.longest, floor)


def _reachable(solver: Solver) -> int | None:
    """The least limit that may do; None where no limit does."""
    pool = solver.pool
    if not solver.reaches(pool.endless).may:
        return None
    pace = sum(Fraction(count, factor) for count, factor in zip(pool.counts, pool.factors, strict=True))
    low, high = int(pool.done[-1] / pace), pool.endless
    step = max(1, low >> 5)
    while low + step < high:
        reached = solver.reaches(low + step)
        if reached.may:
            high = reached.edge
        else:
            low, step = max(low + step + 1, reached.edge), 2 * step
    while low < high:
        middle = (low + high) // 2
        reached = solver.reaches(middle)
        if reached.may:
            high = reached.edge
        else:
            low = max(middle + 1, reached.edge)
    return low


def shortest_step(solver: Solver, microbatches: int) -> Best:
    """The cut with the smallest total + (m - 1) × longest stage.

    By branch and bound over the limit of the longest stage, as :func:`pipekern.plan.search.shortest_step`.
    """
    shortest = smallest_bottleneck(solver)
    if shortest.cut is None:
        return shortest
    search = _Search(solver, microbatches - 1, shortest.cut)
    likely = _likeliest(solver.pool, shortest.least, microbatches - 1)
    search.add(shortest.least, likely, 0, False)
    search.add(likely + 1, solver.pool.endless, 0, False)
    while search.ranges and search.ranges[0].bound < search.goal and solver.spent < _MOST:
        search.look(heapq.heappop(search.ranges))
    least = min(search.goal, search.floor, *(one.bound for one in search.ranges[:1]))
    return Best(search.best, search.goal, least)


class _Range(NamedTuple):
    """Limits from ``low`` to ``high``, all with at least the total ``total`` and the step ``bound``.

    ``known``: whether ``total`` is that of the highest limit, so that only parts of the range have a larger one.
    """

    bound: int
    low: int
    high: int
    total: int
    known: bool


class _Search:
    """``floor`` is the least step of the ranges that were given up."""

    def __init__(self, solver: Solver, repeats: int, best: Cut):
        self._solver, self._repeats, self.best = solver, repeats, best
        self.ranges: list[_Range] = []
        self.floor = self.goal

    @property
    def goal(self) -> int:
        return self._step(self.best)

    def _step(self, cut: Cut) -> int:
        return cut.total + self._repeats * cut.longest

    def add(self, low: int, high: int, total: int, known: bool) -> None:
        if low <= high:
            heapq.heappush(self.ranges, _Range(total + self._repeats * low, low, high, total, known))

    def look(self, one: _Range) -> None:
        """Make a range smaller, or its bound larger."""
        bound, low, high, total, known = one
        budget = self.goal - self._repeats * low
        useful = (self.goal - 1 - total) // self._repeats if self._repeats else high
        middle = (low + high) // 2
        if (high - useful) * 8 > high - low:
            self.add(low, useful, total, False)
        elif not known:
            self.add(low, high, max(total, self._solver.least_total(high, budget)), True)
        elif low < high and self._repeats * (high - low) * 2 > self.goal - bound:
            self.add(low, middle, total, False)
            self.add(middle + 1, high, total, True)
        else:
            self._solve(one, budget)

    def _solve(self, one: _Range, budget: int) -> None:
        found = self._solver.cheapest(one.high, budget)
        if found.cut is not None:
            self.best = min(self.best, found.cut, key=lambda cut: (self._step(cut), cut.longest))
        if found.least >= budget:
            return
        if found.cut is not None and found.least == found.cut.total:
            middle = (one.low + found.cut.longest) // 2
            self.add(one.low, middle - 1, found.least, False)
            self.add(middle, found.cut.longest - 1, found.least, False)
        else:
            self.floor = min(self.floor, max(one.total, found.least) + self._repeats * one.low)


def _likeliest(pool: Pool, low: int, repeats: int) -> int:
    """The limit from ``low`` on under which the step is shortest if layers could be split at will."""
    devices = sorted(zip(pool.factors, pool.counts, strict=True))

    def total(limit: int) -> int:
        return Filling.of(devices, limit).least(pool.done[-1])

    high = pool.endless
    while low < high:
        middle = (low + high) // 2
        if total(middle + 1) + repeats < total(middle):
            low = middle + 1
        else:
            high = middle
    return low
