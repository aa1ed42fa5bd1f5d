from __future__ import annotations

import random

from pipekern.plan.pool import Limited, Pool
from pipekern.plan.prices import Prices
from tests.plan.test_pool import every, pool, times


def test_golden_bound() -> None:
    """Three layers of 6 on a fast and a slow device: two on the fast one under 12, which takes 12 + 12."""
    one = Pool(2, [1, 1], [0, 6, 12, 18], [0] * 4, [1, 2], [], [])
    assert 22 <= Prices(Limited(one, 12), one.endless).root <= 24
    assert Prices(Limited(one, 5), one.endless).root >= one.beyond  # no stage takes a layer


def test_no_cut_is_below_the_bound_at_any_of_its_ends() -> None:
    rng = random.Random()
    for _ in range(30):
        one, limit = pool(rng), rng.randint(10, 60)
        prices = Prices(Limited(one, limit), one.endless)
        for stages in every(one):
            each = times(one, stages)
            if max(each) > limit:
                continue
            state, total = [0] * len(one.counts), 0
            assert prices.root <= sum(each)
            for level, ((_, end, kind), time) in enumerate(zip(stages, each, strict=True), 1):
                state[kind] += 1
                total += time
                assert prices.bound(total, level, end, prices.refund(tuple(state))) <= sum(each)
