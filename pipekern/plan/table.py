"""The cheapest cut under a limit on every stage's time: a dynamic programme over the lattice."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from pipekern.plan.lattice import Filling, Lattice


class Cut(NamedTuple):
    """``bounds`` of the stages, the ``devices`` that have them, their times' ``total`` and the ``longest`` of them."""

    bounds: tuple[int, ...]
    devices: tuple[int, ...]
    total: int
    longest: int


class _Row(NamedTuple):
    """Of each end of a node's stage from ``low`` on: the smallest total (-1: none), and the step that led there."""

    low: int
    totals: list[int]
    starts: list[int]
    steps: list[int]

    @property
    def high(self) -> int:
        return self.low + len(self.totals) - 1

    def trimmed(self) -> _Row:
        """Without the ends at either side that nothing leads to."""
        live = [index for index, total in enumerate(self.totals) if total >= 0]
        part = slice(live[0], live[-1] + 1) if live else slice(0, 0)
        return _Row(self.low + part.start, self.totals[part], self.starts[part], self.steps[part])


Corridor = list[list[dict[int, int]]]


class Table:
    """Of every node and end, the smallest total time of stages of at most ``limit`` that lead there.

    Ends from which the whole cannot stay below ``budget`` are left out. ``corridor`` is that of a table with no lower
    limit and budget.
    """

    def __init__(self, lattice: Lattice, limit: int, budget: int | None = None, corridor: Corridor | None = None):
        self.lattice = lattice
        self.limit = limit
        self.budget = lattice.endless if budget is None else budget
        self.rows: list[list[_Row]] = [[_Row(0, [0], [-1], [-1])]]
        for k, level in enumerate(lattice.windows(limit)[1:], 1):
            ahead = corridor[k] if corridor is not None else [None] * len(level)
            before = self.rows[-1]
            self.rows.append(
                [self._row(k, node, *one, before) for node, one in enumerate(zip(level, ahead, strict=True))]
            )

    def _row(
        self, k: int, node: int, window: tuple[int, int], ahead: dict[int, int] | None, before: list[_Row]
    ) -> _Row:
        lattice = self.lattice
        low, high = window if ahead is None else _narrowed(window, ahead)
        steps = [(i, before[o], d) for i, (o, d) in enumerate(lattice.levels[k][node].steps) if before[o].totals]
        low = max(low, min((row.low for _, row, _ in steps), default=lattice.layers) + 1)
        high = min(high, max((lattice.far(k, r.high, d, self.limit) for _, r, d in steps), default=-1))
        size = max(0, high - low + 1)
        row = _Row(low, [-1] * size, [-1] * size, [-1] * size)
        for step, origin, device in steps:
            self._extend(k, row, step, origin, device)
        if self.budget < lattice.endless:
            self._prune(k, row, lattice.filling(k, node, self.limit) if ahead is None else ahead)
        return row.trimmed()

    def _prune(self, k: int, row: _Row, ahead: dict[int, int] | Filling) -> None:
        """Drop the ends from which the rest cannot stay below the budget."""
        lattice = self.lattice
        room = self.budget - lattice.least_cuts[k]
        for index, total in enumerate(row.totals):
            end = row.low + index
            if isinstance(ahead, Filling):
                cut = lattice.cuts[end] if k < lattice.parts else 0
                good = total + cut + ahead.least(lattice.done[-1] - lattice.done[end]) < room
            else:
                good = total + ahead.get(end, lattice.endless) < self.budget
            if not good:
                row.totals[index] = -1

    def _extend(self, k: int, row: _Row, step: int, origin: _Row, device: int) -> None:
        """Enter into ``row`` what a stage on ``device`` after ``origin`` gives.

        A stage from ``a`` to ``b`` takes ``gain[b] + cost[a]``: the best ``a`` has the smallest ``total + cost`` in a
        range that moves with ``b``. Only where that one is too long because of its cut are the others tried.
        """
        lattice, low, endless = self.lattice, origin.low, self.lattice.endless
        factor = lattice.factors[device]
        beyond = low + len(origin.totals)
        cost = [lattice.cuts[a] - lattice.done[a] * factor for a in range(low, beyond)]
        value = [total + c if total >= 0 else endless for total, c in zip(origin.totals, cost, strict=True)]
        first = low
        for index, known in enumerate(row.totals):
            end = row.low + index
            first = max(first, lattice.near(k, end, device, self.limit))
            part = value[first - low : min(end, beyond) - low]
            least = min(part, default=endless)
            if least == endless:
                continue
            start = first + part.index(least)
            gain = lattice.done[end] * factor + lattice.cuts[end]
            if cost[start - low] + gain > self.limit:
                room = self.limit - gain
                fits = [(v, a) for a, v in enumerate(part, first) if v < endless and cost[a - low] <= room]
                if not fits:
                    continue
                least, start = min(fits)
            if known < 0 or least + gain < known:
                row.totals[index], row.starts[index], row.steps[index] = least + gain, start, step

    def cut(self) -> Cut | None:
        """The cheapest; None where there is none below the budget."""
        lattice = self.lattice
        ends = [(row.totals[-1], node) for node, row in enumerate(self.rows[-1]) if row.totals]
        if len(self.rows) <= lattice.parts or not ends:
            return None
        total, node = min(ends)
        bounds, devices = [lattice.layers], []
        for k in range(lattice.parts, 0, -1):
            row = self.rows[k][node]
            index = bounds[-1] - row.low
            node, device = lattice.levels[k][node].steps[row.steps[index]]
            bounds.append(row.starts[index])
            devices.append(device)
        bounds.reverse()
        devices.reverse()
        longest = max(lattice.time(a, b, d) for (a, b), d in zip(pairwise(bounds), devices, strict=True))
        return Cut(tuple(bounds), tuple(devices), total, longest)

    def corridor(self, budget: int) -> Corridor:
        """What is left to do from every end that is on a cut with a total below ``budget``."""
        lattice, rows = self.lattice, self.rows
        ahead: Corridor = [[{} for _ in level] for level in lattice.levels]
        for node, row in enumerate(rows[-1]):
            if row.totals and row.totals[-1] < budget:
                ahead[-1][node][lattice.layers] = 0
        for k in range(lattice.parts, 0, -1):
            for node, (steps, _) in enumerate(lattice.levels[k]):
                for origin, device in steps:
                    self._lead(k, ahead[k][node], rows[k - 1][origin], device, budget, ahead[k - 1][origin])
        return ahead

    def _lead(self, k: int, ahead: dict[int, int], row: _Row, device: int, budget: int, into: dict[int, int]) -> None:
        """Enter into ``into`` the rest from every end of ``row`` over a stage on ``device``."""
        lattice, low = self.lattice, row.low
        factor = lattice.factors[device]
        for end, rest in ahead.items():
            gain = lattice.done[end] * factor + lattice.cuts[end]
            first = max(lattice.near(k, end, device, self.limit), low)
            for start in range(first, min(end, row.high + 1)):
                time = gain - lattice.done[start] * factor + lattice.cuts[start]
                total = row.totals[start - low]
                good = time <= self.limit and 0 <= total < budget - rest - time
                if good and rest + time < into.get(start, lattice.endless):
                    into[start] = rest + time


def _narrowed(window: tuple[int, int], ahead: dict[int, int]) -> tuple[int, int]:
    return (max(window[0], min(ahead)), min(window[1], max(ahead))) if ahead else (1, 0)
