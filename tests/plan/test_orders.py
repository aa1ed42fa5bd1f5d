from __future__ import annotations

import random

import pytest

from pipekern.plan import orders
from pipekern.plan.pool import Pool
from pipekern.plan.solver import Solver
from tests.plan.test_pool import every, pool, times


def test_golden_trade() -> None:
    """Five layers of 6 on a slow and a fast device: two on the slow one give (36, 36), one gives (18, 48)."""
    one = Solver(Pool(2, [1, 1], [0, 6, 12, 18, 24, 30], [0] * 6, [3, 2], [], []))
    even, uneven = orders.smallest_bottleneck(one), orders.shortest_step(one, 1)
    assert even.cut is not None and (even.value, even.least, even.cut.total, even.gap) == (36, 36, 72, 0)
    assert uneven.cut is not None and (uneven.value, uneven.cut.longest, uneven.gap) == (66, 48, 0)
    assert orders.shortest_step(one, 2).value == 72 + 36


@pytest.mark.parametrize("compiled", [True, False])
def test_against_all_cuts_in_all_orders(compiled: bool) -> None:
    rng = random.Random()
    for _ in range(20):
        one, microbatches = pool(rng), rng.choice([1, 2, 5, 40])
        each = [times(one, stages) for stages in every(one)]
        solver = Solver(one, compiled)
        even, step = orders.smallest_bottleneck(solver), orders.shortest_step(solver, microbatches)
        if not each:
            assert even.cut is None and step.cut is None
            continue
        assert even.value == min(map(max, each)) and even.gap == 0
        assert step.value == min(sum(row) + (microbatches - 1) * max(row) for row in each) and step.gap == 0


def test_the_gap_holds_where_the_work_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "_MOST", 0)
    monkeypatch.setattr("pipekern.plan.solver._WIDTH", 2)
    rng = random.Random()
    for _ in range(40):
        one, microbatches = pool(rng), rng.choice([1, 2, 5, 40])
        each = [times(one, stages) for stages in every(one)]
        even, step = orders.smallest_bottleneck(Solver(one)), orders.shortest_step(Solver(one), microbatches)
        if even.cut is not None and step.cut is not None:
            assert even.least <= min(map(max, each)) <= even.value == even.cut.longest
            best = min(sum(row) + (microbatches - 1) * max(row) for row in each)
            assert step.least <= best <= step.value == step.cut.total + (microbatches - 1) * step.cut.longest
