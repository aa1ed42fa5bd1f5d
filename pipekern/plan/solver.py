"""What the search over limits asks about a pool: answered by ``csrc/plan``, or by the same in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipekern.plan.beam import Found, cheapest
from pipekern.plan.pool import Limited, Pool, Reached
from pipekern.plan.prices import Prices
from pipekern.plan.table import Cut, packed

if TYPE_CHECKING:
    from pipekern import _C

_BITS = 126
_WIDTH = 500  # (state, end) that a level keeps


class Solver:
    """Counts in ``spent`` what the answers cost, in about nanoseconds of compiled code; no clock decides anything."""

    def __init__(self, pool: Pool, compiled: bool = True):
        self.pool = pool
        self.spent = 0
        self._compiled = _compiled(pool) if compiled else None
        size = len(pool.counts)
        self._states = pool.states * size * 4
        self._prices = pool.layers * size * (1000 + 60 * pool.parts * bool(pool.held))
        self._beam = min(_WIDTH, pool.states * pool.layers) * pool.parts * size * 150

    def reaches(self, limit: int) -> Reached:
        """See :class:`Reached`."""
        self.spent += self._states
        if self._compiled is None:
            return Limited(self.pool, limit).reached()
        may, edge = self._compiled.reaches(packed([limit]))
        return Reached(may, _number(edge))

    def least_total(self, limit: int, budget: int) -> int:
        """No cut with stages of at most ``limit`` has a smaller total; the budget where none is below that."""
        self.spent += self._prices
        if self._compiled is None:
            return min(budget, Prices(Limited(self.pool, limit), budget).root)
        return _number(self._compiled.least_total(packed([limit]), packed([budget])))

    def cheapest(self, limit: int, budget: int) -> Found:
        """See :func:`pipekern.plan.beam.cheapest`."""
        self.spent += self._prices + 2 * self._states + self._beam
        if self._compiled is None:
            return cheapest(Limited(self.pool, limit), budget, _WIDTH)
        cut, least = self._compiled.cheapest(packed([limit]), packed([budget]), _WIDTH)
        if cut is None:
            return Found(None, _number(least))
        bounds, kinds, total = cut
        times = [self.pool.time(*stage) for stage in zip(bounds[:-1], bounds[1:], kinds, strict=True)]
        return Found(Cut(tuple(bounds), tuple(kinds), _number(total), max(times)), _number(least))


def _compiled(pool: Pool) -> _C.Pool | None:
    try:
        from pipekern import _C
    except ImportError:
        return None
    largest = max(pool.beyond, *pool.caps, *(row[-1] for row in pool.held), 0)
    if largest.bit_length() > _BITS:
        return None
    done, cuts, factors, caps = (packed(row) for row in (pool.done, pool.cuts, pool.factors, pool.caps))
    rows = {id(row): packed(row) for row in {id(row): row for row in pool.held}.values()}
    return _C.Pool(pool.parts, pool.counts, done, cuts, factors, [rows[id(row)] for row in pool.held], caps)


def _number(value: bytes) -> int:
    return int.from_bytes(value, "little", signed=True)
