from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekern.errors import ConfigError
from pipekern.plan import partition


def test_golden_cut() -> None:
    found = partition([7, 3, 9, 4, 8, 2, 6, 5, 1, 10, 3, 7], 3)
    assert (found.bounds, found.times, found.bottleneck) == ((0, 4, 9, 12), (23, 22, 20), 23)


def test_where_a_block_heuristic_gives_5() -> None:
    assert partition([1, 1, 3, 2, 3], 4).bottleneck == 3


def test_speeds_are_of_devices_in_order() -> None:
    found = partition([6, 6, 6, 6], 2, speeds=[3, 1])
    assert (found.bounds, found.times) == ((0, 3, 4), (6, 6))


def test_a_cut_costs_both_sides() -> None:
    found = partition([5, 1, 1, 5], 2, cut_costs=[0, 0, 9, 0, 0])
    assert found.bounds in ((0, 1, 4), (0, 3, 4)) and found.bottleneck == 7


number = st.one_of(st.integers(0, 20), st.floats(0, 20, allow_nan=False))


@given(st.data())
def test_no_cut_is_better(data: st.DataObject) -> None:
    costs = data.draw(st.lists(number, min_size=1, max_size=8))
    parts = data.draw(st.integers(1, len(costs)))
    speeds = data.draw(st.none() | st.lists(st.sampled_from([0.5, 1, 1.5, 3]), min_size=parts, max_size=parts))
    cuts = data.draw(st.none() | st.lists(number, min_size=len(costs) + 1, max_size=len(costs) + 1))
    found = partition(costs, parts, speeds=speeds, cut_costs=cuts)
    exact = [times(costs, bounds, speeds, cuts) for bounds in every_cut(len(costs), parts)]
    assert found.bottleneck == float(min(map(max, exact)))
    assert found.times == tuple(map(float, times(costs, found.bounds, speeds, cuts)))
    assert found.bottleneck == max(found.times) and all(a < b for a, b in pairwise(found.bounds))


def every_cut(layers: int, parts: int) -> list[tuple[int, ...]]:
    return [(0, *inner, layers) for inner in combinations(range(1, layers), parts - 1)]


def times(
    costs: Sequence[float], bounds: Sequence[int], speeds: Sequence[float] | None, cuts: Sequence[float] | None
) -> list[Fraction]:
    """By the definition, in exact fractions."""
    speeds, cuts = speeds or [1] * (len(bounds) - 1), cuts or [0] * (len(costs) + 1)
    return [
        sum(map(Fraction, costs[i:j]), Fraction(0)) / Fraction(speed) + Fraction(cuts[i]) + Fraction(cuts[j])
        for (i, j), speed in zip(pairwise(bounds), speeds, strict=True)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": 5}, "parts=5: 4 layers make at least 1 and at most 4 stages"),
        ({"parts": 0}, "parts=0"),
        ({"costs": [1, -1]}, "costs=-1 is not a finite number"),
        ({"costs": [1, float("nan")]}, "costs=nan"),
        ({"speeds": [1]}, "2 stages need 2 finite speeds above 0"),
        ({"speeds": [1, 0]}, "speeds=.1, 0."),
        ({"cut_costs": [0, 1]}, "cut_costs has 2 values; 4 layers need 5"),
        ({"cut_costs": [0, 1, -3, 1, 0]}, "cut_costs=-3"),
    ],
)
def test_wrong_input(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        partition(**{"costs": [7, 3, 9, 4], "parts": 2} | arguments)  # type: ignore[arg-type]
