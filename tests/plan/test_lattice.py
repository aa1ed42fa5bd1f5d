from __future__ import annotations

import random
from itertools import accumulate, combinations

import pytest

from pipekern.plan.lattice import Filling, Lattice, fixed_order


def lattice(parts: int, layers: int, rng: random.Random) -> Lattice:
    done = [0, *accumulate(rng.randint(0, 9) for _ in range(layers))]
    cuts = [rng.randint(0, 9) for _ in range(layers + 1)]
    return Lattice(fixed_order(parts), done, cuts, [rng.randint(1, 4) for _ in range(parts)], [], [])


def test_golden_order() -> None:
    assert [[node.steps for node in level] for level in fixed_order(2)] == [[[]], [[(0, 0)]], [[(0, 1)]]]


def test_windows_hold_every_cut_under_the_limit() -> None:
    rng = random.Random()
    for _ in range(30):
        parts, layers = rng.randint(1, 4), rng.randint(4, 8)
        one = lattice(parts, layers, rng)
        limit = rng.randint(1, 60)
        windows = one.windows(limit)
        for inner in combinations(range(1, layers), parts - 1):
            bounds = (0, *inner, layers)
            if all(one.time(bounds[k], bounds[k + 1], k) <= limit for k in range(parts)):
                assert all(windows[k][0][0] <= bounds[k] <= windows[k][0][1] for k in range(parts + 1))


def test_least_total_is_a_bound() -> None:
    rng = random.Random()
    for _ in range(30):
        parts, layers = rng.randint(1, 4), rng.randint(4, 8)
        one = lattice(parts, layers, rng)
        for inner in combinations(range(1, layers), parts - 1):
            bounds = (0, *inner, layers)
            times = [one.time(bounds[k], bounds[k + 1], k) for k in range(parts)]
            assert one.least_total(max(times)) <= sum(times) < one.endless


@pytest.mark.parametrize(("amount", "time"), [(0, 0), (5, 5), (10, 10), (13, 16), (15, 20), (16, 22)])
def test_filling_uses_the_fastest_first(amount: int, time: int) -> None:
    """Under a limit of 10 a device of 1 tick a unit does 10 units, one of 2 ticks another 5; beyond, its pace."""
    assert Filling.of([(1, 1), (2, 1)], 10).least(amount) == time
