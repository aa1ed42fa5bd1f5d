from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, combinations, pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekern.errors import ConfigError
from pipekern.plan.partition import Partition, StageMemory, partition, partition_types


def test_golden_cut() -> None:
    found = partition([7, 3, 9, 4, 8, 2, 6, 5, 1, 10, 3, 7], 3)
    assert (found.bounds, found.times, found.bottleneck) == ((0, 4, 8, 12), (23, 21, 21), 23)


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


def test_early_stages_hold_more() -> None:
    """The first of two stages holds two micro-batches: the cap that lets it have two layers, and one below."""
    memory = StageMemory(fixed=[10] * 4, activations=[5] * 4, in_flight=[2, 1], caps=50)
    assert partition([1, 1, 1, 1], 2, memory=memory).bounds == (0, 2, 4)
    memory = StageMemory(fixed=[10] * 4, activations=[5] * 4, in_flight=[2, 1], caps=[39, 45])
    assert partition([1, 1, 1, 1], 2, memory=memory).bounds == (0, 1, 4)


def test_says_how_much_is_missing() -> None:
    memory = StageMemory(fixed=[10] * 4, activations=[5] * 4, in_flight=[2, 1], caps=35)
    with pytest.raises(ConfigError, match=r"stays within caps=35 bytes; every device would need at least 5 bytes more"):
        partition([1, 1, 1, 1], 2, memory=memory)


def test_step_time_is_not_the_bottleneck_alone() -> None:
    """A slow first device: with many micro-batches it takes its share, with one it gets as little as it can."""
    costs, speeds = [3, 3, 3, 3, 3], [1, 1.5]
    assert partition(costs, 2, speeds, microbatches=100).times == (6, 6)
    assert partition(costs, 2, speeds, microbatches=1).times == (3, 8)


def test_a_single_type_has_nothing_to_arrange() -> None:
    memory = StageMemory([1] * 4, [1] * 4, [2, 1], [0, 6])
    found = partition_types([1, 2, 3, 4], [0, 2], [1, 2], memory=memory)
    assert (found.bounds, found.devices, found.bottleneck) == ((0, 2, 4), (1, 1), 3.5)


def test_order_of_types_is_free() -> None:
    found = partition_types([9, 2, 9], [2, 1], [3, 1])
    assert (found.bounds, found.devices, found.bottleneck) == ((0, 1, 2, 3), (0, 1, 0), 3)


@pytest.mark.parametrize("microbatches", [None, 512])
def test_hundreds_of_devices_of_three_types(microbatches: int | None) -> None:
    """2,000 layers on 256 devices: no better than what devices could do if layers could be split, and proven to 1 %."""
    rng = random.Random()
    costs, counts, speeds = [rng.uniform(1, 3) for _ in range(2000)], [80, 90, 86], [1.0, 1.7, 2.9]
    found = partition_types(costs, counts, speeds, microbatches=microbatches)
    assert [found.devices.count(kind) for kind in range(3)] == counts and found.gap < 0.01
    exact = times(costs, found.bounds, [speeds[kind] for kind in found.devices], None)
    assert found.times == pytest.approx([float(time) for time in exact], rel=1e-6)
    ideal = sum(costs) / sum(count * speed for count, speed in zip(counts, speeds, strict=True))
    assert found.bottleneck >= ideal * (1 - 1e-6)


whole = st.integers(0, 20)


@given(st.data())
def test_no_cut_is_better_under_caps_by_step_time_and_in_any_order(data: st.DataObject) -> None:
    costs = data.draw(st.lists(whole, min_size=2, max_size=7))
    layers, types = len(costs), data.draw(st.integers(1, 3))
    counts = [data.draw(st.integers(1, 2)) for _ in range(types)]
    parts = data.draw(st.integers(1, min(layers, sum(counts))))
    speeds = [data.draw(st.sampled_from([0.3, 0.5, 1, 1.5, 3])) for _ in counts]
    cuts = data.draw(st.lists(whole, min_size=layers + 1, max_size=layers + 1))
    microbatches = data.draw(st.none() | st.integers(1, 12))
    flight = data.draw(st.lists(st.integers(0, 3), min_size=parts, max_size=parts))
    fixed = data.draw(st.lists(whole, min_size=layers, max_size=layers))
    activations = data.draw(st.lists(whole, min_size=layers, max_size=layers))
    caps = [data.draw(st.integers(0, 100)) for _ in counts]
    pool = [kind for kind, count in enumerate(counts) for _ in range(count)]
    orders = set(permutations(pool, parts))

    def best(order: tuple[int, ...]) -> list[tuple[Fraction, Fraction]]:
        """(bottleneck or step, total) of every cut that fits."""
        found = []
        for bounds in every_cut(layers, parts):
            sizes = [
                sum(fixed[i:j]) + held * sum(activations[i:j])
                for (i, j), held in zip(pairwise(bounds), flight, strict=True)
            ]
            if all(size <= caps[kind] for size, kind in zip(sizes, order, strict=True)):
                each = times(costs, bounds, [speeds[kind] for kind in order], cuts)
                step = max(each) if microbatches is None else sum(each) + (microbatches - 1) * max(each)
                found.append((Fraction(step), sum(each, Fraction(0))))
        return found

    def value(found: Partition) -> float:
        return found.bottleneck if microbatches is None else found.step(microbatches)

    every = {order: best(order) for order in orders}
    memory = StageMemory(fixed, activations, flight, caps)
    if not any(every.values()):
        with pytest.raises(ConfigError, match="every device would need at least"):
            partition_types(costs, counts, speeds, parts, cuts, memory=memory, microbatches=microbatches)
        return
    free = partition_types(costs, counts, speeds, parts, cuts, memory=memory, microbatches=microbatches)
    assert value(free) == pytest.approx(float(min(min(found)[0] for found in every.values() if found)), rel=1e-12)
    order = free.devices
    memory = StageMemory(fixed, activations, flight, [caps[kind] for kind in order])
    fixed_order = partition(
        costs, parts, [speeds[kind] for kind in order], cuts, memory=memory, microbatches=microbatches
    )
    assert value(fixed_order) == pytest.approx(float(min(every[order])[0]), rel=1e-12)
    if microbatches is None:  # the smallest total among those with the smallest bottleneck
        assert sum(fixed_order.times) == pytest.approx(float(min(every[order])[1]), rel=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("microbatches", [None, 1, 7, 40, 1000])
def test_agrees_with_a_table_for_every_limit(microbatches: int | None) -> None:
    """20 layers on 5 devices of continuous speeds, against a dynamic programme under every time a stage can have."""
    rng = random.Random()
    costs, cuts = [rng.uniform(1, 9) for _ in range(20)], [rng.uniform(0, 5) for _ in range(21)]
    speeds = [rng.uniform(0.5, 2) for _ in range(5)]
    found = partition(costs, 5, speeds, cuts, microbatches=microbatches)
    before = [0.0, *accumulate(costs)]

    def stage(k: int, i: int, j: int) -> float:
        return (before[j] - before[i]) / speeds[k] + cuts[i] + cuts[j]

    def total(limit: float) -> float:
        best = {0: 0.0}
        for k in range(5):
            reached: dict[int, float] = {}
            for i, sofar in best.items():
                for j in range(i + 1, 21):
                    if stage(k, i, j) <= limit:
                        reached[j] = min(reached.get(j, math.inf), sofar + stage(k, i, j))
            best = reached
        return best.get(20, math.inf)

    limits = {stage(k, i, j) for k in range(5) for i in range(20) for j in range(i + 1, 21)}
    if microbatches is None:
        assert found.bottleneck == pytest.approx(min(x for x in limits if total(x) < math.inf), rel=1e-9)
    else:
        least = min(total(limit) + (microbatches - 1) * limit for limit in limits)
        assert found.step(microbatches) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": 5}, "parts=5: 4 layers make at least 1 and at most 4 stages"),
        ({"parts": 0}, "parts=0"),
        ({"costs": [1, -1]}, "costs=-1 is not a finite number"),
        ({"costs": [1, float("nan")]}, "costs=nan"),
        ({"speeds": [1]}, "2 stages need 2 of them"),
        ({"speeds": [1, 0]}, "speeds=0 is not a finite number above 0"),
        ({"microbatches": 0}, "microbatches=0; a step needs at least 1"),
        ({"memory": StageMemory([1] * 4, [1] * 3, [2, 1], 9)}, "memory.activations has 3 values; it needs 4"),
        ({"memory": StageMemory([1] * 4, [1] * 4, [2, 1], -1)}, "memory.caps=-1"),
        ({"cut_costs": [0, 1]}, "cut_costs has 2 values; 4 layers need 5"),
        ({"cut_costs": [0, 1, -3, 1, 0]}, "cut_costs=-3"),
    ],
)
def test_wrong_input(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        partition(**{"costs": [7, 3, 9, 4], "parts": 2} | arguments)  # type: ignore[arg-type]


def test_no_devices() -> None:
    with pytest.raises(ConfigError, match="give at least one device"):
        partition_types([1, 2], [], [])
    with pytest.raises(ConfigError, match="give at least one device"):
        partition_types([1, 2], [0, 0], [1, 1])
    with pytest.raises(ConfigError, match="17850625 choices of how many are in use are more than 16777216"):
        partition_types([1] * 300, [64] * 4, [1, 2, 3, 4])
    with pytest.raises(ConfigError, match="parts=3: there are 2 devices"):
        partition_types([1, 2, 3], [1, 1], [1, 1], parts=3)
