"""Prices of devices, under which the shortest path through the layers bounds every cut that uses what there is.

``csrc/plan/prices.cpp`` is the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from pipekern.plan.pool import Limited, Pool, State

_TRIES = 150
_CLOSE = 1e-6  # of the bound: prices are not sought any nearer

Number = TypeVar("Number", int, float)


class Prices:
    """Lagrange's relaxation of the numbers of devices.

    A stage pays the price of its device, and what all devices of a cut pay is given back. The prices are the best for
    the limit, the bound being concave in them. ``ahead[b]`` is the least that the layers from b on take with prices,
    wherever they are cut and however many devices that needs; by level where memory is by position.
    """

    def __init__(self, limited: Limited, budget: int):
        self._pool = pool = limited.pool
        most = 4 * float(limited.limit)
        self._prices = [int(max(-most, min(most, price))) for price in _best(limited, budget)]
        end = [pool.beyond] * pool.layers + [0]
        if not pool.held:
            row = list(end)
            _relax(
                pool, pool.work, self._prices, lambda kind, start: limited.far(1, kind, start), row, row, pool.beyond
            )
            self._ahead = [row] * (pool.parts + 1)
            return
        self._ahead = [end]
        for level in range(pool.parts, 0, -1):
            row = [pool.beyond] * (pool.layers + 1)
            far = partial(limited.far, level)
            _relax(pool, pool.work, self._prices, far, self._ahead[0], row, pool.beyond)
            self._ahead.insert(0, row)

    def bound(self, total: int, level: int, end: int, refund: int) -> int:
        """What a cut takes at least that has come to ``end`` for ``total``."""
        rest = self._ahead[level][end]
        return rest if rest >= self._pool.beyond else total + rest - refund

    def refund(self, state: State) -> int:
        """The most that the devices of a cut can pay which are still to come."""
        left = [count - in_use for count, in_use in zip(self._pool.counts, state, strict=True)]
        return _dearest(self._prices, left, self._pool.parts - sum(state))[0]

    @property
    def root(self) -> int:
        """No cut has a smaller total."""
        return self.bound(0, 0, 0, self.refund((0,) * len(self._pool.counts)))


class _First(NamedTuple):
    """Where the first stage ends, and the kind that has it."""

    end: int
    kind: int


def _relax(
    pool: Pool,
    work: Sequence[Sequence[Number]],
    prices: Sequence[Number],
    far: Callable[[int, int], int],
    after: Sequence[Number],
    made: list[Number],
    endless: Number,
) -> list[_First | None]:
    """Fill in of each start the least that the rest takes, ``after`` which a stage ends; it may be ``made`` itself."""
    first: list[_First | None] = [None] * len(made)
    least: list[deque[tuple[Number, int]]] = [deque() for _ in prices]  # each with an earlier end that is dearer
    for start in range(pool.layers - 1, -1, -1):
        for kind, price in enumerate(prices):
            ends = least[kind]
            if after[start + 1] < endless:
                now = work[kind][start + 1] + pool.cuts[start + 1] + after[start + 1]
                while ends and ends[-1][0] >= now:
                    ends.pop()
                ends.append((now, start + 1))
            while ends and ends[0][1] > far(kind, start):
                ends.popleft()
            if ends:
                whole = ends[0][0] - work[kind][start] + pool.cuts[start] + price
                if whole < made[start]:
                    made[start], first[start] = whole, _First(ends[0][1], kind)
    return first


def _dearest(prices: Sequence[Number], left: Sequence[int], count: int) -> tuple[Number, list[int]]:
    """The most that ``count`` of the devices that are left pay, those of the highest prices; and how many of each."""
    use = [0] * len(prices)
    for kind in sorted(range(len(prices)), key=lambda kind: -prices[kind]):
        use[kind] = min(count, left[kind])
        count -= use[kind]
    return sum(price * some for price, some in zip(prices, use, strict=True)), use


def _best(limited: Limited, budget: int) -> list[float]:
    pool = limited.pool
    levels = range(1, pool.parts + 1 if pool.held else 2)
    far = [[max(limited.far(k, kind, a) for k in levels) for a in range(pool.layers + 1)] for kind in pool.kinds]
    work = [[float(value) for value in row] for row in pool.work]
    within = _Ellipsoid(_first_guess(pool, float(limited.limit)), float(limited.limit))
    best, prices = -math.inf, within.x
    for _ in range(_TRIES):
        ahead = [math.inf] * pool.layers + [0.0]
        first = _relax(pool, work, within.x, lambda kind, start: far[kind][start], ahead, ahead, math.inf)
        if math.isinf(ahead[0]):
            break
        paid, use = _dearest(within.x, pool.counts, pool.parts)
        slope, start = [-float(some) for some in use], 0
        while (one := first[start]) is not None:
            slope[one.kind] += 1
            start = one.end
        if ahead[0] - paid > best:
            best, prices = ahead[0] - paid, list(within.x)
        if best >= budget or not within.shrink(slope, ahead[0] - paid, best):
            break
    return prices


def _first_guess(pool: Pool, limit: float) -> list[float]:
    """What work would save on a faster device, against the slowest in use, if it could be split at will."""
    rest, slowest = float(pool.done[-1]), 0.0
    for factor, count in sorted(zip(pool.factors, pool.counts, strict=True)):
        if rest <= 0:
            break
        slowest = float(factor)
        rest -= limit / slowest * count
    layer = pool.done[-1] / pool.layers
    return [(slowest - factor) * (limit / factor if factor < slowest else layer) for factor in pool.factors]


class _Ellipsoid:
    """Where a concave function is largest, by the ellipsoid method with deep cuts; ``x`` is the centre.

    M. Grötschel, L. Lovász, A. Schrijver, Geometric Algorithms and Combinatorial Optimization, 1988.
    """

    def __init__(self, x: list[float], radius: float):
        self.x = x
        self._shape = [[radius * radius if i == j else 0.0 for j in range(len(x))] for i in range(len(x))]

    def shrink(self, slope: Sequence[float], value: float, best: float) -> bool:
        """Leave out where the function is not above ``best``; False where hardly anything is left to gain."""
        n = len(self.x)
        along = [sum(p * g for p, g in zip(row, slope, strict=True)) for row in self._shape]
        square = sum(a * g for a, g in zip(along, slope, strict=True))
        if not square > 0 or value + math.sqrt(square) - best < _CLOSE * abs(best):
            return False
        width = math.sqrt(square)
        depth = (best - value) / width
        if depth >= 1:
            return False
        scale = n * n * (1 - depth * depth) / (n * n - 1)
        cut = 2 * (1 + n * depth) / ((n + 1) * (1 + depth) * square)
        self.x = [x + (1 + n * depth) / ((n + 1) * width) * a for x, a in zip(self.x, along, strict=True)]
        for row, a in zip(self._shape, along, strict=True):
            row[:] = [scale * (p - cut * a * b) for p, b in zip(row, along, strict=True)]
        return True
