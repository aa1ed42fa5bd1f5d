"""The cheapest cut under a limit for devices in any order, level by level, with what bounds all that was left out.

``csrc/plan/beam.cpp`` is the same, a hundred times as fast. This one stands in where pipekern was installed without a
compiler, and for integers that do not fit in its 128 bits.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

from pipekern.plan.pool import Limited, State, used
from pipekern.plan.prices import Prices
from pipekern.plan.table import Cut


class Found(NamedTuple):
    """The cut of the smallest total that was seen, its devices being kinds.

    No cut under the limit has a total below ``least`` (the budget where none is below that): a cut whose total is
    ``least`` is the best.
    """

    cut: Cut | None
    least: int


class _End(NamedTuple):
    """A way to (state, end): its total, the state before, its end, and the kind of the last stage."""

    total: int
    before: State
    start: int
    kind: int


_Ends = dict[tuple[State, int], _End]


def cheapest(limited: Limited, budget: int, width: int) -> Found:
    """The cut of the smallest total with stages of at most the limit and a total below ``budget``, or a bound.

    Of each level the ``width`` (state, end) of the smallest bounds are kept.
    """
    pool, dropped = limited.pool, budget
    if not limited.may:
        return Found(None, budget)
    prices = Prices(limited, budget)
    levels: list[_Ends] = [{((0,) * len(pool.counts), 0): _End(0, (), 0, 0)}]
    for level in range(1, pool.parts + 1):
        made: _Ends = {}
        for key, end in _extended(limited, level, levels[-1]):
            if key not in made or end.total < made[key].total:
                made[key] = end
        bounds = {key: prices.bound(end.total, level, key[1], prices.refund(key[0])) for key, end in made.items()}
        kept = [key for key in made if bounds[key] < budget]
        if len(kept) > width:
            *kept, over = heapq.nsmallest(width + 1, kept, key=bounds.__getitem__)
            dropped = min(dropped, bounds[over])
        levels.append({key: made[key] for key in kept})
    cut = _cut(limited, levels)
    least = dropped if cut is None else min(dropped, cut.total)
    return Found(cut, max(least, min(budget, prices.root)))


def _extended(limited: Limited, level: int, before: _Ends) -> Iterator[tuple[tuple[State, int], _End]]:
    """Every stage after those of the level before."""
    pool = limited.pool
    for (state, start), (total, *_) in before.items():
        for kind in pool.kinds:
            after = used(state, kind, 1)
            if after not in limited.low:
                continue
            last = min(limited.far(level, kind, start), limited.high[after])
            for end in range(max(start + 1, limited.low[after]), last + 1):
                time = pool.time(start, end, kind)
                if time <= limited.limit:
                    yield (after, end), _End(total + time, state, start, kind)


def _cut(limited: Limited, levels: list[_Ends]) -> Cut | None:
    pool = limited.pool
    if not levels[-1]:
        return None
    state, end = min(levels[-1], key=lambda key: levels[-1][key].total)
    total = levels[-1][state, end].total
    bounds, kinds = [end], []
    for ends in reversed(levels[1:]):
        _, state, end, kind = ends[state, end]
        bounds.append(end)
        kinds.append(kind)
    bounds.reverse()
    kinds.reverse()
    times = [pool.time(*stage) for stage in zip(bounds[:-1], bounds[1:], kinds, strict=True)]
    return Cut(tuple(bounds), tuple(kinds), total, max(times))
