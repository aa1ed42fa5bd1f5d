from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, combinations, pairwise

import pytest

from pipekern.plan.lattice import Lattice, fixed_order
from pipekern.plan.table import Cut, Table, cheapest_of
from tests.plan.test_lattice import lattice

Way = Callable[[Lattice, int, int], Cut | None]
HUGE = 1 << 130  # no 128 bits hold it: left to Python


def python(one: Lattice, limit: int, budget: int) -> Cut | None:
    return Table(one, limit, budget).cut()


def compiled(one: Lattice, limit: int, budget: int) -> Cut | None:
    return cheapest_of(one)(limit, budget)


def huge(one: Lattice, limit: int, budget: int) -> Cut | None:
    scaled = replace(
        one,
        done=[HUGE * value for value in one.done],
        cuts=[HUGE * value for value in one.cuts],
        held=[[HUGE * value for value in row] for row in one.held],
        caps=[HUGE * cap for cap in one.caps],
    )
    cut = cheapest_of(scaled)(HUGE * limit, HUGE * budget)
    return cut and cut._replace(total=cut.total // HUGE, longest=cut.longest // HUGE)


both = pytest.mark.parametrize("cheapest", [python, compiled, huge])


@both
def test_golden_limit_and_budget(cheapest: Way) -> None:
    """Layers of 1, 2 and 3 on two devices, cuts of 5 and 0 between them."""
    one = Lattice(fixed_order(2), [0, 1, 3, 6], [0, 5, 0, 0], [1, 1], [], [])
    cut = cheapest(one, 100, 100)
    assert cut is not None and (cut.bounds, cut.total, cut.longest) == ((0, 2, 3), 6, 3)
    assert cheapest(one, 2, 100) is None
    assert cheapest(one, 100, 6) is None and cheapest(one, 100, 7) == cut


@both
def test_cheapest_of_all_cuts_with_any_budget(cheapest: Way) -> None:
    rng = random.Random()
    for _ in range(60):
        parts, layers = rng.randint(1, 4), rng.randint(4, 8)
        one = lattice(parts, layers, rng)
        if rng.random() < 0.5:
            held = [[0, *accumulate(rng.randint(0, 9) for _ in range(layers))] for _ in range(parts)]
            one = replace(one, held=held, caps=[rng.randint(5, 30) for _ in range(parts)])
        limit, budget = rng.randint(5, 80), rng.randint(20, 200)
        every = [list(pairwise((0, *inner, layers))) for inner in combinations(range(1, layers), parts - 1)]
        fitting = [cut for cut in every if all(_fits(one, k, *stage, k) for k, stage in enumerate(cut))]
        times = [[one.time(a, b, k) for k, (a, b) in enumerate(cut)] for cut in fitting]
        totals = [sum(each) for each in times if max(each) <= limit and sum(each) < budget]
        cut = cheapest(one, limit, budget)
        assert (cut.total if cut else None) == min(totals, default=None)
        if cut:
            assert cut.longest == max(one.time(a, b, k) for k, (a, b) in enumerate(pairwise(cut.bounds))) <= limit


def _fits(one: Lattice, k: int, start: int, end: int, device: int) -> bool:
    return not one.held or one.held[k][end] - one.held[k][start] <= one.caps[device]


def test_compiled_and_python_find_the_same_cut() -> None:
    rng = random.Random()
    for _ in range(20):
        one = lattice(rng.randint(2, 12), rng.randint(20, 60), rng)
        limit = rng.randint(20, 400)
        assert compiled(one, limit, one.endless) == python(one, limit, one.endless)


@pytest.mark.parametrize("bits", [118, 122, 124, 125, 126, 127])
def test_integers_near_the_widest_that_are_compiled(bits: int) -> None:
    """Limits and budgets may be larger than any cut's time."""
    rng = random.Random()
    for _ in range(20):
        small = lattice(3, 6, rng)
        scale = 1 << (bits - small.endless.bit_length())
        one = replace(small, done=[scale * work for work in small.done], cuts=[scale * cut for cut in small.cuts])
        limit, budget = rng.randint(5, 80), rng.randint(20, 200)
        for most, below in ((limit, budget), (small.endless, small.endless), (1000 * small.endless, 1000 * budget)):
            cut = compiled(one, scale * most, scale * below)
            assert cut == python(one, scale * most, scale * below)
            known = python(small, most, below)
            assert (cut and cut.total // scale) == (known and known.total)
