from __future__ import annotations

import random

import pytest

from pipekern.plan.beam import cheapest
from pipekern.plan.pool import Limited, Pool
from tests.plan.test_pool import every, pool, times


def test_golden_order() -> None:
    """Layers of 9, 2 and 9 on two fast devices and a slow one: it takes the small one, in the middle."""
    found = cheapest(Limited(Pool(3, [2, 1], [0, 9, 11, 20], [0] * 4, [1, 3], [], []), 9), 1000, 10)
    assert found.cut is not None and (found.cut.bounds, found.cut.devices) == ((0, 1, 2, 3), (0, 1, 0))
    assert (found.cut.total, found.cut.longest, found.least) == (24, 9, 24)


@pytest.mark.parametrize("width", [1, 3, 1000])
def test_the_cheapest_or_a_bound(width: int) -> None:
    rng = random.Random()
    for _ in range(40):
        one, limit, budget = pool(rng), rng.randint(5, 80), rng.randint(20, 200)
        totals = [sum(each) for each in (times(one, stages) for stages in every(one)) if max(each) <= limit]
        best = min([total for total in totals if total < budget], default=None)
        cut, least = cheapest(Limited(one, limit), budget, width)
        assert least <= (budget if best is None else best)
        if cut is not None:
            stages = list(zip(cut.bounds[:-1], cut.bounds[1:], cut.devices, strict=True))
            assert stages in list(every(one))
            assert cut.total == sum(times(one, stages)) < budget and cut.longest == max(times(one, stages)) <= limit
        if width == 1000:
            assert (cut and cut.total) == best and least == (budget if best is None else best)
