from __future__ import annotations

import random
from itertools import combinations, pairwise

from pipekern.plan.lattice import Lattice, fixed_order
from pipekern.plan.table import Table
from tests.plan.test_lattice import lattice


def test_golden_limit_and_budget() -> None:
    """Layers of 1, 2 and 3 on two devices, cuts of 5 and 0 between them."""
    one = Lattice(fixed_order(2), [0, 1, 3, 6], [0, 5, 0, 0], [1, 1], [], [])
    cut = Table(one, 100).cut()
    assert cut is not None and (cut.bounds, cut.total, cut.longest) == ((0, 2, 3), 6, 3)
    assert Table(one, 2).cut() is None
    assert Table(one, 100, budget=6).cut() is None and Table(one, 100, budget=7).cut() == cut


def test_cheapest_of_all_cuts_with_any_budget_and_corridor() -> None:
    rng = random.Random()
    for _ in range(60):
        parts, layers = rng.randint(1, 4), rng.randint(4, 8)
        one = lattice(parts, layers, rng)
        limit = rng.randint(5, 80)
        every = [(0, *inner, layers) for inner in combinations(range(1, layers), parts - 1)]
        times = [[one.time(a, b, k) for k, (a, b) in enumerate(pairwise(bounds))] for bounds in every]
        totals = [sum(each) for each in times if max(each) <= limit]
        table = Table(one, limit)
        cut = table.cut()
        assert (cut.total if cut else None) == min(totals, default=None)
        if cut:
            assert cut.longest == max(one.time(a, b, k) for k, (a, b) in enumerate(pairwise(cut.bounds))) <= limit
            budget = cut.total + rng.randint(0, 20)
            lower = rng.randint(0, limit)
            under = [sum(each) for each in times if max(each) <= lower and sum(each) < budget]
            again = Table(one, lower, budget, table.corridor(budget)).cut()
            assert (again.total if again else None) == min(under, default=None)
