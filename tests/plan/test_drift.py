"""The test for a part that has become slower."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipekern.plan.drift import LEARNING, SETTLING, Change, Drift

READY = SETTLING + LEARNING
LIMIT = 8  # of the 10 steps within which a slow stage is named, up to 2 pass before the ranks tell each other


def test_golden() -> None:
    """Four parts, the third takes 1.5 times as long from a step on, and later what it took."""
    drift, times = Drift(4), [10.0, 12.0, 8.0, 10.0]
    for _ in range(READY + 10):
        assert drift.see(times) == []
    slow = [10.0, 12.0, 12.0, 10.0]
    assert [drift.see(slow) for _ in range(3)] == [[]] * 3
    [(part, factor)] = drift.see(slow)
    assert part == 2 and 1.45 < factor < 1.5
    assert drift.slow.keys() == {2}
    again = [change for _ in range(10) for change in drift.see(times)]
    assert again == [Change(2, 1.0)]
    assert drift.slow == {}


def recorded(name: str) -> list[list[float]]:
    """Measured times of two stages; the head of the file says where."""
    with (Path(__file__).parent / f"steps_{name}.csv").open() as file:
        return [[float(cell) for cell in row] for row in csv.reader(file) if not row[0].startswith(("#", "stage"))]


def steady(generator: random.Random) -> list[list[float]]:
    """Four stages, 5 % of noise."""
    return [[t * generator.lognormvariate(0, 0.05) for t in (1e3, 7e2, 1.1e3, 9e2)] for _ in range(1000)]


def heavy_tailed(generator: random.Random) -> list[list[float]]:
    """Three stages; a stage's step in a hundred takes longer, with no finite variance."""
    return [
        [
            1e3 * (1 + 0.05 * generator.random() + (generator.random() < 0.01) * generator.paretovariate(1.5))
            for _ in range(3)
        ]
        for _ in range(1000)
    ]


def collected(generator: random.Random) -> list[list[float]]:
    """A garbage collector stops one stage for four times its work, every 40 steps; slow first steps."""
    rows = []
    for step in range(1000):
        warm = 30 if step < 3 else 1
        rows.append(
            [warm * 5e2 * generator.lognormvariate(0, 0.03) * (5 if (step + 20 * s) % 40 < 1 else 1) for s in range(2)]
        )
    return rows


NOISES = pytest.mark.parametrize("noise", [steady, heavy_tailed, collected])


def alarms(rows: Sequence[Sequence[float]]) -> list[Change]:
    drift = Drift(len(rows[0]))
    return [change for row in rows for change in drift.see(row)]


@pytest.fixture
def generator() -> random.Random:
    seed = random.SystemRandom().getrandbits(31)
    print(f"SEED={seed}")
    return random.Random(seed)


@NOISES
def test_a_thousand_clean_steps_are_no_alarm(
    noise: Callable[[random.Random], list[list[float]]], generator: random.Random
) -> None:
    assert alarms(noise(generator)) == []


@pytest.mark.parametrize("name", ["shared", "busy"])
def test_recorded_steps_are_no_alarm(name: str) -> None:
    rows = recorded(name)
    assert len(rows) >= 1000
    assert alarms(rows) == []


def named(rows: Sequence[Sequence[float]], part: int, at: int, factor: float) -> tuple[int, int] | None:
    """The part that is named first after ``part`` slows down at row ``at``, and how many steps that takes."""
    drift = Drift(len(rows[0]))
    for step, row in enumerate(rows):
        slowed = [t * factor if i == part and step >= at else t for i, t in enumerate(row)]
        for change in drift.see(slowed):
            return change.part, step - at + 1
    return None


@NOISES
@pytest.mark.parametrize("factor", [1.5, 2, 4])
def test_the_right_part_is_named(
    noise: Callable[[random.Random], list[list[float]]], factor: float, generator: random.Random
) -> None:
    """In 50 of 50 trials, whenever it begins."""
    for _ in range(50):
        rows = noise(generator)[: READY + 200]
        part, at = generator.randrange(len(rows[0])), generator.randrange(READY, READY + 150)
        found = named(rows, part, at, factor)
        assert found is not None and found[0] == part and 0 < found[1] <= LIMIT, f"{part} at {at}: {found}"


@pytest.mark.parametrize(
    ("name", "factor", "limit"), [("shared", 1.5, 10), ("shared", 2, LIMIT), ("busy", 2, LIMIT), ("busy", 4, LIMIT)]
)
def test_the_right_part_is_named_in_recorded_steps(name: str, factor: float, limit: int) -> None:
    """In every trial, one at every 15th step of the record."""
    rows = recorded(name)
    for at in range(READY, len(rows) - limit, 15):
        part, start = at // 15 % 2, max(0, at - 100)
        found = named(rows[start : at + limit], part, at - start, factor)
        assert found is not None and found[0] == part, f"{part} at {at}: {found}"


def test_work_that_all_have_is_nobodys_fault(generator: random.Random) -> None:
    """Batches of changing sizes, told or not; a machine that is slower as a whole, faster as a whole."""
    base = steady(generator)
    sizes = [generator.choice((1, 2, 4)) if step > 300 else 2 for step in range(len(base))]
    assert alarms([[t * size for t in row] for row, size in zip(base, sizes, strict=True)]) == []
    drift = Drift(4)
    told = [drift.see([t * (s + 0.2) for t in row], s) for row, s in zip(base, sizes, strict=True)]
    assert not any(told)
    for factor in (0.4, 2.5):
        assert alarms([[t * (factor if step > 200 else 1) for t in row] for step, row in enumerate(base)]) == []


def test_a_part_that_becomes_faster_is_no_alarm() -> None:
    """Nor are the others, which have become slower only beside it."""
    assert alarms([[1.0, 1.0]] * 50 + [[0.5, 1.0]] * 100) == []


def test_one_that_takes_next_to_nothing_is_never_named(generator: random.Random) -> None:
    assert alarms([[1e3, 1e3, generator.choice((1, 2, 5))] for _ in range(1000)]) == []


def test_slow_is_told_until_it_is_over_and_one_part_alone_never() -> None:
    drift = Drift(2)
    for row in [[1.0, 1.0]] * 40 + [[2.0, 1.0]] * 500:
        drift.see(row)
    assert drift.slow.keys() == {0} and 1.9 < drift.slow[0] <= 2.0
    assert alarms([[1.0]] * 40 + [[3.0]] * 100) == []


def test_parts_that_take_no_time_at_all() -> None:
    assert alarms([[0.0, 0.0]] * 100) == []
