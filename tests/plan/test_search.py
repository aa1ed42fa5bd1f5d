from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from pipekern.plan.lattice import Lattice, fixed_order
from pipekern.plan.search import shortest_step, smallest_bottleneck
from tests.plan.test_lattice import lattice


def test_golden_trade() -> None:
    """Five layers of 6 on a slow and a fast device: two on the slow one give (12, 12), one gives (6, 16)."""
    one = Lattice(fixed_order(2), [0, 6, 12, 18, 24, 30], [0] * 6, [3, 2], [], [])
    even, uneven = smallest_bottleneck(one), shortest_step(one, 1)
    assert even is not None and (even.bounds, even.longest, even.total) == ((0, 2, 5), 36, 72)
    assert uneven is not None and (uneven.bounds, uneven.longest, uneven.total) == ((0, 1, 5), 48, 66)
    assert shortest_step(one, 2) == even


def test_none_where_memory_has_no_room() -> None:
    one = Lattice(fixed_order(1), [0, 1], [0, 0], [1], [[0, 5]], [4])
    assert smallest_bottleneck(one) is None and shortest_step(one, 3) is None


@pytest.mark.parametrize("microbatches", [1, 2, 5, 30])
def test_against_all_cuts(microbatches: int) -> None:
    rng = random.Random()
    for _ in range(25):
        parts, layers = rng.randint(1, 5), rng.randint(5, 9)
        one = lattice(parts, layers, rng)
        every = [(0, *inner, layers) for inner in combinations(range(1, layers), parts - 1)]
        times = [[one.time(a, b, k) for k, (a, b) in enumerate(pairwise(bounds))] for bounds in every]
        even, step = smallest_bottleneck(one), shortest_step(one, microbatches)
        assert even is not None and step is not None
        assert (even.longest, even.total) == min((max(each), sum(each)) for each in times)
        least = min(sum(each) + (microbatches - 1) * max(each) for each in times)
        assert step.total + (microbatches - 1) * step.longest == least
