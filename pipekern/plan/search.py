"""The best cut of a lattice: by its slowest stage, or by the time of a whole step."""

from __future__ import annotations

import heapq
from typing import NamedTuple

from pipekern.plan.lattice import Lattice
from pipekern.plan.table import Cheapest, Cut, cheapest_of


def smallest_bottleneck(lattice: Lattice) -> Cut | None:
    """The cut whose longest stage is shortest, and among those one of the smallest total; None where none fits.

    Exact, by bisection over integers: first over what would do if cuts were free, then over what does.
    """
    return _shortest_longest(lattice, cheapest_of(lattice))


def _shortest_longest(lattice: Lattice, cheapest: Cheapest) -> Cut | None:
    if not lattice.windows(lattice.endless):
        return None
    low, high = 0, lattice.endless
    while low < high:
        middle = (low + high) // 2
        if not lattice.windows(middle):
            low = middle + 1
        else:
            high = middle
    best = cheapest(low, lattice.endless)
    step = 2 * max(lattice.cuts) or 1
    while best is None:
        if low > lattice.endless:
            return None
        low, high = high + 1, high + step
        best = cheapest(high, lattice.endless)
        step *= 2
    while low < best.longest:
        middle = (low + best.longest - 1) // 2
        better = cheapest(middle, lattice.endless)
        if better is None:
            low = middle + 1
        else:
            best = better
    return best


def shortest_step(lattice: Lattice, microbatches: int) -> Cut | None:
    """The cut with the smallest total + (m - 1) × longest stage; None where none fits.

    Exact, by branch and bound over the limit of the longest stage: under a higher limit the total can only be smaller,
    so that a range of limits is at best the total of its highest with the longest stage of its lowest.
    """
    cheapest = cheapest_of(lattice)
    best = _shortest_longest(lattice, cheapest)
    if best is None:
        return None
    repeats = microbatches - 1
    least = best.longest + 1
    likely = _likeliest(lattice, least, repeats)
    ranges: list[_Range] = []

    def add(low: int, high: int, total: int) -> None:
        if low <= high:
            total = max(total, lattice.least_total(high))
            heapq.heappush(ranges, _Range(total + repeats * low, low, high, total))

    add(least, likely, 0)
    add(likely + 1, lattice.endless, 0)
    while ranges:
        bound, low, high, total = heapq.heappop(ranges)
        goal = _step(best, repeats)
        if bound >= goal:
            break
        useful = (goal - 1 - total) // repeats if repeats else high
        if (high - useful) * 8 > high - low:
            add(low, useful, total)
            continue
        cut = cheapest(high, goal - repeats * low)
        if cut is None:
            continue
        best = min(best, cut, key=lambda one: (_step(one, repeats), one.longest))
        middle = (low + cut.longest) // 2
        add(low, middle - 1, cut.total)
        add(middle, cut.longest - 1, cut.total)
    return best


class _Range(NamedTuple):
    """Limits from ``low`` to ``high``, all with at least the total ``total`` and the step ``bound``."""

    bound: int
    low: int
    high: int
    total: int


def _step(cut: Cut, repeats: int) -> int:
    return cut.total + repeats * cut.longest


def _likeliest(lattice: Lattice, low: int, repeats: int) -> int:
    """The limit from ``low`` on under which the step is shortest if layers could be split at will."""
    high = lattice.endless
    while low < high:
        middle = (low + high) // 2
        if lattice.least_total(middle + 1) + repeats < lattice.least_total(middle):
            low = middle + 1
        else:
            high = middle
    return low
