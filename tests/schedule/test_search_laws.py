"""The laws that hold exactly at unit costs, over grids; and small cases proved optimal by a solver."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pipekern.schedule import Costs, search

pytest.importorskip("pipekern._C", reason="the search is in the compiled part, which was not built here")

UNIT = Costs(forward=1, backward=1, weight=1)
HALVES = Costs(forward=2, backward=2, weight=2)  # one chunk of two: a unit


def assert_one_chunk(ranks: int, microbatches: int, memory: int) -> None:
    result = search(ranks, microbatches, UNIT, memory, "single")
    timeline = result.simulate(UNIT)
    assert timeline.span == 3 * microbatches + max(0, 2 * ranks - 1 - min(memory, microbatches))
    assert max(timeline.peak_activations) <= memory
    assert result.gap == 0


def v_idle(ranks: int, halves: int) -> int:
    if halves >= 2 * ranks:
        return 0
    return 3 if halves == 2 * ranks - 1 else 6 * ranks - 1 - 3 * halves


def assert_v(ranks: int, microbatches: int, halves: int) -> None:
    result = search(ranks, microbatches, HALVES, halves / 2, "v")
    timeline = result.simulate(HALVES)
    assert timeline.span == 6 * microbatches + v_idle(ranks, halves)
    assert max(timeline.peak_activations) <= halves / 2
    assert timeline.makespan >= result.lower_bound and timeline.span >= result.lower_bound


@pytest.mark.parametrize(
    ("ranks", "microbatches", "memory"),
    [(1, 3, 1), (2, 4, 3), (3, 3, 5), (4, 8, 4), (4, 8, 6), (5, 7, 9), (8, 24, 8), (8, 40, 11), (16, 33, 25)],
)
def test_one_chunk(ranks: int, microbatches: int, memory: int) -> None:
    assert_one_chunk(ranks, microbatches, memory)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "halves"),
    [
        (4, 8, 4),
        (4, 9, 5),
        (4, 8, 7),
        (5, 10, 6),
        (6, 12, 6),
        (7, 14, 7),
        (7, 20, 13),
        (8, 16, 8),
        (8, 64, 8),
        (9, 18, 13),
        (12, 24, 23),
        (13, 26, 26),
        (16, 32, 17),
        (16, 32, 30),
        (16, 40, 32),
    ],
)
def test_v_placement(ranks: int, microbatches: int, halves: int) -> None:
    assert_v(ranks, microbatches, halves)


@pytest.mark.full
@pytest.mark.parametrize("ranks", range(1, 17))
def test_one_chunk_on_the_whole_grid(ranks: int) -> None:
    for microbatches in sorted({1, ranks, 2 * ranks - 1, 2 * ranks, 3 * ranks, 5 * ranks + 1}):
        for memory in range(ranks, 2 * ranks + 2):
            assert_one_chunk(ranks, microbatches, memory)


@pytest.mark.full
@pytest.mark.parametrize("ranks", range(4, 17))
def test_v_placement_on_the_whole_grid(ranks: int) -> None:
    fewest = ranks if ranks != 5 else 6  # 5 ranks with 5 half-activations: the proved optimum is above the law
    for microbatches in (2 * ranks, 2 * ranks + 1, 4 * ranks + 3):
        for halves in range(fewest, 2 * ranks + 2):
            assert_v(ranks, microbatches, halves)


@pytest.mark.parametrize("placement", ["single", "v"])
def test_more_memory_is_never_worse(placement: str) -> None:
    spans = [
        search(5, 12, UNIT, memory, placement).simulate(UNIT).span  # type: ignore[arg-type]
        for memory in (1, 1.5, 2, 2.5, 3, 4, 5, 7, 9, 12)
    ]
    assert all(more <= less for less, more in pairwise(spans))


def proved_optimum(ranks: int, microbatches: int, chunks: int, memory: int) -> int:
    """The least span at unit costs a chunk and ``memory`` chunk activations, by CP-SAT; fails if it takes too long."""
    cp_model = pytest.importorskip("ortools.sat.python.cp_model", reason="needs pip install pipekern[prove]")
    model = cp_model.CpModel()
    stages = ranks * chunks
    rank_of = [stage if stage < ranks else 2 * ranks - 1 - stage for stage in range(stages)]
    latest = 3 * microbatches * stages + ranks
    start = {
        (op, stage, i): model.new_int_var(rank_of[stage], latest, f"{stage}{op}{i}")
        for op in "FBW"
        for stage in range(stages)
        for i in range(microbatches)
    }
    span = model.new_int_var(0, latest, "span")
    for (op, stage, i), time in start.items():
        if i:
            model.add(time > start[op, stage, i - 1])
        if op == "F" and stage:
            model.add(time > start["F", stage - 1, i])
        if op == "B":
            model.add(time > (start["F", stage, i] if stage == stages - 1 else start["B", stage + 1, i]))
        if op == "W":
            model.add(time > start["B", stage, i])
            model.add(span >= time + 1 - rank_of[stage])
    for rank in range(ranks):
        model.add(start["F", rank, 0] == rank)  # the first F comes down the chain without a stop
        own = [key for key in start if rank_of[key[1]] == rank]
        model.add_all_different([start[key] for key in own])
        held = []
        for op, stage, i in own:
            if op == "F":
                life = model.new_int_var(0, latest, "")
                end = start["W", stage, i] + 1
                held.append(model.new_interval_var(start[op, stage, i], life, end, ""))
        model.add_cumulative(held, [1] * len(held), memory)
    model.minimize(span)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = 100
    assert solver.solve(model) == cp_model.OPTIMAL
    return round(solver.objective_value)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "memory"), [(2, 4, 1), (3, 6, 2), (4, 8, 2), (4, 8, 3), (4, 8, 5), (5, 10, 3), (6, 12, 4)]
)
def test_one_chunk_proved(ranks: int, microbatches: int, memory: int) -> None:
    best = proved_optimum(ranks, microbatches, 1, memory)
    assert search(ranks, microbatches, UNIT, memory, "single").simulate(UNIT).span == best


@pytest.mark.parametrize(("ranks", "microbatches", "halves"), [(2, 4, 2), (3, 6, 3), (3, 6, 5), (4, 4, 3), (4, 8, 4)])
def test_v_placement_proved(ranks: int, microbatches: int, halves: int) -> None:
    best = proved_optimum(ranks, microbatches, 2, halves)
    assert search(ranks, microbatches, HALVES, halves / 2, "v").simulate(HALVES).span == best


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6])
def test_one_chunk_proved_on_the_whole_grid(ranks: int) -> None:
    for microbatches in (ranks, ranks + 1, 2 * ranks):
        for memory in range(1, ranks + 1):
            test_one_chunk_proved(ranks, microbatches, memory)


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "microbatches", "halves"),
    [(ranks, m, halves) for ranks in (2, 3, 4) for m in (ranks, 2 * ranks) for halves in range(2, 2 * ranks + 1)],
)
def test_v_placement_proved_on_the_whole_grid(ranks: int, microbatches: int, halves: int) -> None:
    test_v_placement_proved(ranks, microbatches, halves)
