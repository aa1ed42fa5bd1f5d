"""The test for a part that has become slower."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from pipekern.plan.drift import STEPS, SUMS, Change, Drift, Scale

READY = STEPS.settling + STEPS.learning
LIMIT = 10  # steps within which a slow stage is named
RECORDS = pytest.mark.parametrize("name", ["moderate", "shared", "busy"])


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
    assert [drift.see(times) for _ in range(3)] == [[]] * 3 and drift.in_doubt
    assert drift.see(times) == [Change(2, 1.0)]
    assert drift.slow == {} and not drift.in_doubt


class Recorded(NamedTuple):
    """Measured times of two stages: what the fastest micro-batch takes, and all. The head of the file says where."""

    fastest: list[list[float]]
    sums: list[list[float]]  # of five steps each

    @staticmethod
    def read(name: str) -> Recorded:
        with (Path(__file__).parent / f"steps_{name}.csv").open() as file:
            rows = [[float(cell) for cell in row] for row in csv.reader(file) if row[0][0].isdigit()]
        sums = [[sum(column) for column in zip(*rows[at : at + 5], strict=True)] for at in range(0, len(rows), 5)]
        return Recorded([row[:2] for row in rows], [row[2:] for row in sums])


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


def alarms(rows: Sequence[Sequence[float]], scale: Scale = STEPS) -> list[Change]:
    drift = Drift(len(rows[0]), scale)
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


@RECORDS
def test_recorded_steps_are_no_alarm(name: str) -> None:
    record = Recorded.read(name)
    assert len(record.fastest) >= 1000
    assert alarms(record.fastest) == []
    assert alarms(record.sums, SUMS) == []


def named(
    rows: Sequence[Sequence[float]], part: int, at: int, factor: float, scale: Scale = STEPS
) -> tuple[int, int] | None:
    """The part that is named first after ``part`` slows down at row ``at``, and how many steps that takes."""
    drift = Drift(len(rows[0]), scale)
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


@RECORDS
@pytest.mark.parametrize("factor", [1.5, 2, 4])
def test_the_right_part_is_named_in_recorded_steps(name: str, factor: float) -> None:
    """In every trial, one at every 10th step of the record."""
    rows = Recorded.read(name).fastest
    for at in range(READY, len(rows) - LIMIT, 10):
        part, start = at // 10 % 2, max(0, at - 100)
        found = named(rows[start : at + LIMIT], part, at - start, factor)
        assert found is not None and found[0] == part, f"{part} at {at}: {found}"


@pytest.mark.parametrize(("name", "limit"), [("moderate", 6), ("shared", 16)])
def test_the_right_part_is_named_by_sums(name: str, limit: int) -> None:
    """They scatter more, and more with more load."""
    rows = Recorded.read(name).sums
    for at in range(20, len(rows) - limit, 3):
        part, start = at % 2, max(0, at - 40)
        found = named(rows[start : at + limit], part, at - start, 2.0, SUMS)
        assert found is not None and found[0] == part, f"{part} at {at}: {found}"


@RECORDS
def test_what_is_slow_stays_so_until_it_is_over(name: str) -> None:
    """Each stage in turn is slow for 100 steps: two changes each time, and the factor is told."""
    rows = Recorded.read(name).fastest
    for at in range(READY, len(rows) - 150, 75):
        drift, part, found = Drift(2), at % 2, []
        for step, row in enumerate(rows[at - READY : at + 150]):
            slow = READY + 10 <= step < READY + 110
            found += drift.see([t * 1.5 if i == part and slow else t for i, t in enumerate(row)])
            assert part not in drift.slow or 1.1 < drift.slow[part] < 2.2 or not slow
        assert [change.part for change in found] == [part] * 2 and found[1].factor == 1.0, f"{at}: {found}"


def test_a_slow_rise_is_found(generator: random.Random) -> None:
    """Half as much again over 400 steps is named, and so is no other part."""
    rows = steady(generator)[:600]
    found = alarms(
        [
            [t * (1 + min(step / 400, 1) / 2) if i == 1 else t for i, t in enumerate(row)]
            for step, row in enumerate(rows)
        ]
    )
    assert [change.part for change in found] == [1]


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
