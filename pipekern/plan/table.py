"""The cheapest cut under a limit on every stage's time: a dynamic programme over the lattice.

Large lattices need it some hundred times: ``csrc/plan/cut.cpp`` is the same programme, a hundred times as fast. This
one stands in where pipekern was installed without a compiler, and for integers that do not fit in its 128 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

from pipekern.plan.lattice import Lattice

_BYTES = 16
_BITS = 126


class Cut(NamedTuple):
    """``bounds`` of the stages, the ``devices`` that have them, their times' ``total`` and the ``longest`` of them."""

    bounds: tuple[int, ...]
    devices: tuple[int, ...]
    total: int
    longest: int


Cheapest = Callable[[int, int], Cut | None]


def cheapest_of(lattice: Lattice) -> Cheapest:
    """A function of ``limit`` and ``budget``.

    It returns the cut of the smallest total among those with stages of at most ``limit`` and a total below ``budget``;
    None where there is none.
    """
    endless = lattice.endless
    devices = sum(count for _, count in lattice.left[0][0])
    most = endless * (devices + 4)  # all that devices can do under a limit, and what is added to it
    largest = max(most, *lattice.caps, *(row[-1] for row in lattice.held), 0)
    try:
        from pipekern import _C
    except ImportError:
        return lambda limit, budget: Table(lattice, limit, budget).cut()
    if largest.bit_length() > _BITS:
        return lambda limit, budget: Table(lattice, limit, budget).cut()
    table = _C.Lattice(
        [[node.steps for node in level] for level in lattice.levels],
        [[packed(number for pair in left for number in pair) for left in level] for level in lattice.left],
        packed(lattice.done),
        packed(lattice.cuts),
        packed(lattice.factors),
        [packed(row) for row in lattice.held],
        packed(lattice.caps),
        packed(lattice.least_cuts),
    )

    def cheapest(limit: int, budget: int) -> Cut | None:
        windows = lattice.windows(limit)
        if not windows:
            return None
        found = table.cheapest(windows, packed([min(limit, endless)]), packed([min(budget, endless)]))
        return _cut(lattice, found[0], found[1], int.from_bytes(found[2], "little", signed=True)) if found else None

    return cheapest


def packed(numbers: Iterable[int]) -> bytes:
    return b"".join(number.to_bytes(_BYTES, "little", signed=True) for number in numbers)


def _cut(lattice: Lattice, bounds: Iterable[int], devices: Iterable[int], total: int) -> Cut:
    bounds, devices = tuple(bounds), tuple(devices)
    longest = max(lattice.time(a, b, d) for (a, b), d in zip(pairwise(bounds), devices, strict=True))
    return Cut(bounds, devices, total, longest)


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


class Table:
    """Of every node and end, the smallest total time of stages of at most ``limit`` that lead there.

    Ends from which the whole cannot stay below ``budget`` are left out.
    """

    def __init__(self, lattice: Lattice, limit: int, budget: int):
        self.lattice = lattice
        self.limit = limit
        self.budget = budget
        self.rows: list[list[_Row]] = [[_Row(0, [0], [-1], [-1])]]
        for k, level in enumerate(lattice.windows(limit)[1:], 1):
            before = self.rows[-1]
            self.rows.append([self._row(k, node, window, before) for node, window in enumerate(level)])

    def _row(self, k: int, node: int, window: tuple[int, int], before: list[_Row]) -> _Row:
        lattice, (low, high) = self.lattice, window
        steps = [(i, before[o], d) for i, (o, d) in enumerate(lattice.levels[k][node].steps) if before[o].totals]
        low = max(low, min((row.low for _, row, _ in steps), default=lattice.layers) + 1)
        high = min(high, max((lattice.far(k, r.high, d, self.limit) for _, r, d in steps), default=-1))
        size = max(0, high - low + 1)
        row = _Row(low, [-1] * size, [-1] * size, [-1] * size)
        for step, origin, device in steps:
            self._extend(k, row, step, origin, device)
        self._prune(k, node, row)
        return row.trimmed()

    def _prune(self, k: int, node: int, row: _Row) -> None:
        """Drop the ends from which the rest cannot stay below the budget."""
        lattice = self.lattice
        room = self.budget - lattice.least_cuts[k]
        filling = lattice.filling(k, node, self.limit)
        for index, total in enumerate(row.totals):
            end = row.low + index
            cut = lattice.cuts[end] if k < lattice.parts else 0
            if total + cut + filling.least(lattice.done[-1] - lattice.done[end]) >= room:
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
        return _cut(lattice, reversed(bounds), reversed(devices), total)
