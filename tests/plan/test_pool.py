from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate, combinations, pairwise, permutations

from pipekern.plan.pool import Limited, Pool, Reached

Stages = list[tuple[int, int, int]]  # start, end, kind


def pool(rng: random.Random) -> Pool:
    """3 to 7 layers, two or three kinds, half of them with memory, some stages in use."""
    layers, counts = rng.randint(3, 7), [rng.randint(1, 2) for _ in range(rng.randint(2, 3))]
    parts = rng.randint(1, min(layers, sum(counts)))
    done = [0, *accumulate(rng.randint(0, 9) for _ in range(layers))]
    cuts = [rng.choice([0, rng.randint(0, 9)]) for _ in range(layers + 1)]
    held: list[list[int]] = []
    if rng.random() < 0.5:
        each = [0, *accumulate(rng.randint(0, 9) for _ in range(layers))]
        held = [[value * (parts - k) for value in each] for k in range(parts)]
    caps = [rng.randint(5, 60) for _ in counts] if held else []
    return Pool(parts, counts, done, cuts, [rng.randint(1, 4) for _ in counts], held, caps)


def every(one: Pool) -> Iterator[Stages]:
    """All cuts in all orders that memory allows."""
    kinds = [kind for kind, count in enumerate(one.counts) for _ in range(count)]
    orders = set(permutations(kinds, one.parts))
    for inner in combinations(range(1, one.layers), one.parts - 1):
        for order in orders:
            stages = [(a, b, kind) for (a, b), kind in zip(pairwise((0, *inner, one.layers)), order, strict=True)]
            if not one.held or all(
                one.held[k][b] - one.held[k][a] <= one.caps[kind] for k, (a, b, kind) in enumerate(stages)
            ):
                yield stages


def times(one: Pool, stages: Stages) -> list[int]:
    return [one.time(*stage) for stage in stages]


def test_golden_reach() -> None:
    """Three layers of 6; under 12 the fast kind (1 tick a unit) takes two of them, the slow one (2 ticks) one."""
    one = Pool(2, [1, 1], [0, 6, 12, 18], [0] * 4, [1, 2], [], [])
    limited = Limited(one, 12)
    assert limited.high == {(0, 0): 0, (1, 0): 2, (0, 1): 1, (1, 1): 3}
    assert limited.low == {(0, 0): 0, (1, 0): 2, (0, 1): 1, (1, 1): 3}
    assert limited.reached() == Reached(True, 12) and Limited(one, 11).reached() == Reached(False, 12)


def test_every_cut_under_the_limit_is_within_reach() -> None:
    rng = random.Random()
    for _ in range(30):
        one, limit = pool(rng), rng.randint(1, 60)
        limited = Limited(one, limit)
        for stages in every(one):
            if max(times(one, stages)) <= limit:
                assert limited.may
                state = [0] * len(one.counts)
                for _, end, kind in stages:
                    state[kind] += 1
                    assert limited.low[tuple(state)] <= end <= limited.high[tuple(state)]


def test_the_edge_is_where_the_answer_may_change() -> None:
    rng = random.Random()
    for _ in range(30):
        one, limit = pool(rng), rng.randint(1, 60)
        may, edge = Limited(one, limit).reached()
        if may:
            assert edge <= limit and Limited(one, edge).may
        else:
            assert edge > limit and not Limited(one, min(edge - 1, 4 * one.endless)).may
