from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations, pairwise
from typing import Any

import pytest

from pipekern.errors import ConfigError
from pipekern.plan.balance import Balance, UnitCosts, UnitMemory, balance, predicted
from pipekern.schedule.ir import Schedule
from pipekern.schedule.registry import build
from pipekern.schedule.simulate import Costs

EVEN = UnitCosts([1] * 6, [1] * 6, [1] * 6)


def test_golden_balance() -> None:
    """A rank that is twice as slow gets half as many units as the other; one by one both take 12 for a micro-batch."""
    schedule = build("1f1b", ranks=2, microbatches=4)
    assert balance(EVEN, schedule, [1, 1]) == ((3, 3), 45)
    assert balance(EVEN, schedule, [1, 2]) == ((4, 2), 60)
    assert predicted([3, 3], EVEN, schedule, [1, 2]) == 81


def test_the_step_is_that_of_the_schedule() -> None:
    """Under zb-h1 the ends wait less, so that a split which is good for 1f1b need not be; both are simulated."""
    rng = random.Random()
    for name in ("1f1b", "zb-h1", "zb-v", "interleaved-1f1b"):
        schedule = build(name, ranks=2, microbatches=4)
        costs, slowness = drawn(rng, 8), [rng.uniform(1, 2), rng.uniform(1, 2)]
        found = balance(costs, schedule, slowness)
        forward, backward, weight = (
            [sum(row[i:j]) * slowness[rank] for (i, j), rank in zip(bounds(found), schedule.stage_rank, strict=True)]
            for row in (costs.forward, costs.backward, costs.weight)
        )
        assert isinstance(costs.comm, list)
        comm = [costs.comm[end - 1] for _, end in bounds(found)[:-1]]
        assert found.step == pytest.approx(schedule.simulate(Costs(forward, backward, weight, comm)).makespan)
        assert found.step == predicted(found.split, costs, schedule, slowness)


def drawn(rng: random.Random, units: int) -> UnitCosts:
    forward, backward, weight, comm = ([rng.uniform(1, 3) for _ in range(units)] for _ in range(4))
    return UnitCosts(forward, backward, weight, comm)


def bounds(found: Balance) -> list[tuple[int, int]]:
    return list(pairwise([0, *accumulate(found.split)]))


def splits(units: int, stages: int) -> Iterator[tuple[int, ...]]:
    for inner in combinations(range(1, units), stages - 1):
        yield tuple(j - i for i, j in pairwise((0, *inner, units)))


@pytest.mark.parametrize(("name", "ranks"), [("1f1b", 3), ("zb-h1", 3), ("gpipe", 2), ("dualpipe", 2), ("zb-v", 2)])
def test_no_split_within_two_moves_is_better(name: str, ranks: int) -> None:
    rng = random.Random()
    schedule = build(name, ranks=ranks, microbatches=6)
    costs, slowness = drawn(rng, 7), [rng.choice([1, 1.25, 1.5, 2, 4]) for _ in range(ranks)]
    found = balance(costs, schedule, slowness)
    for split in splits(7, schedule.depth):
        if sum(abs(a - b) for a, b in zip(split, found.split, strict=True)) <= 4:
            assert found.step <= predicted(split, costs, schedule, slowness) * (1 + 1e-12)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "most"), [("1f1b", 1.005), ("zb-h1", 1.005), ("gpipe", 1.005), ("zb-v", 1.05), ("interleaved-1f1b", 1.05)]
)
def test_near_the_best_of_all_splits(name: str, most: float) -> None:
    """On average over random cases; nearly always it is the best. With two stages a rank a local best was 10 % off."""
    rng = random.Random()
    over = []
    for _ in range(10):
        schedule = build(name, ranks=3, microbatches=6)
        costs, slowness = drawn(rng, 10), [rng.choice([1, 1.25, 1.5, 2, 4]) for _ in range(3)]
        best = min(predicted(split, costs, schedule, slowness) for split in splits(10, schedule.depth))
        over.append(balance(costs, schedule, slowness).step / best)
    assert sum(over) / len(over) <= most


def test_golden_cap() -> None:
    """The first rank holds two micro-batches: 2 units of 10 + 2 x 5 bytes fit under 40, a third does not."""
    schedule = build("1f1b", ranks=2, microbatches=4)
    memory = UnitMemory([10] * 6, [5] * 6, [40, 60])
    assert balance(EVEN, schedule, [1, 1], memory=memory).split == (2, 4)
    with pytest.raises(ConfigError, match=r"no cut of 6 layers into 2 stages stays within caps=39, 59 bytes"):
        balance(EVEN, schedule, [1, 1], memory=UnitMemory([10] * 6, [5] * 6, [39, 59]))


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "interleaved-1f1b", "zb-v"])
def test_no_rank_over_its_cap(name: str) -> None:
    rng = random.Random()
    schedule = build(name, ranks=2, microbatches=4)
    costs, fixed, kept = drawn(rng, 7), *([rng.randint(1, 9) for _ in range(7)] for _ in range(2))
    fitting: list[Sequence[int]] = []
    caps = [rng.randint(30, 150), rng.randint(30, 150)]
    for split in splits(7, schedule.depth):
        if all(held <= cap for held, cap in zip(held_bytes(schedule, split, fixed, kept), caps, strict=True)):
            fitting.append(split)
    try:
        found = balance(costs, schedule, [1, 1.5], memory=UnitMemory(fixed, kept, caps))
    except ConfigError as error:
        assert "memory" in str(error) and (not fitting or schedule.chunks > 1)
    else:
        assert found.split in fitting


def held_bytes(schedule: Schedule, split: Sequence[int], fixed: Sequence[int], kept: Sequence[int]) -> list[int]:
    """By the definition: units held from F to W, and what each rank holds anyway."""
    ends = [0, *accumulate(split)]
    peaks = []
    for rank, row in enumerate(schedule.actions):
        parts = {stage: slice(ends[stage], ends[stage + 1]) for stage in schedule.stages_of(rank)}
        held = peak = sum(sum(fixed[part]) for part in parts.values())
        for action in row:
            held += {"F": 1, "B": 0, "W": -1, "BW": -1}[action.op] * sum(kept[parts[action.stage]])
            peak = max(peak, held)
        peaks.append(peak)
    return peaks


def test_nothing_within_the_caps_of_two_chunks() -> None:
    schedule = build("interleaved-1f1b", ranks=2, microbatches=4)
    with pytest.raises(ConfigError, match=r"no split of 6 units .* found within the caps; the nearest, .* too much"):
        balance(EVEN, schedule, [1, 1], memory=UnitMemory([10] * 6, [5] * 6, [30, 30]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: predicted([3, 2], EVEN, s, [1, 1]), r"split=\[3, 2\]: give each of 2 stages .* 6 units"),
        (lambda s: predicted([6, 0], EVEN, s, [1, 1]), r"split=\[6, 0\]"),
        (lambda s: predicted([6], EVEN, s, [1, 1]), r"split=\[6\]"),
        (lambda s: balance(EVEN, s, [1]), r"slowness=\[1\]: give each of 2 ranks a factor"),
        (lambda s: balance(EVEN, s, [1, 0]), r"slowness=\[1, 0\]"),
        (lambda s: balance(EVEN, s, [1, float("inf")]), r"slowness=\[1, inf\]"),
        (lambda s: balance(UnitCosts([1], [1], [1]), s, [1, 1]), "1f1b has 2 stages and the model 1 units"),
        (lambda s: UnitCosts([1, 2], [1], [1, 1]), "backward has 1 values for 2 units"),
        (lambda s: UnitCosts([1, 2], [1, 1], [1, -1]), "weight=-1 is not a finite number"),
        (lambda s: UnitCosts([1, 2], [1, 1], [1, 1], [1]), "comm has 1 values for 2 units"),
        (lambda s: balance(EVEN, s, [1, 1], memory=UnitMemory([1] * 6, [1] * 5, [9, 9])), "memory.activations="),
        (lambda s: balance(EVEN, s, [1, 1], memory=UnitMemory([1] * 6, [1] * 6, [9])), r"memory.caps=\[9\]: give 2"),
    ],
)
def test_wrong_input(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(build("1f1b", ranks=2, microbatches=4))
