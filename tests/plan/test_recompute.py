"""The choice of what is recomputed: within memory, at the least time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise, product

import pytest

from pipekern.errors import ConfigError
from pipekern.plan.recompute import UnitWays, Way, choose_recompute
from pipekern.schedule.ir import Schedule
from pipekern.schedule.registry import build

HOWS = ("none", "selective", "full")


def _unit(*pairs: tuple[float, float], waiting: float = 0.0) -> UnitWays:
    return UnitWays([Way(how, *pair) for how, pair in zip(HOWS, pairs, strict=False)], waiting)


BLOCK = _unit((100, 0), (60, 3), (10, 8))


def _counts(hows: Sequence[str]) -> tuple[int, ...]:
    return tuple(list(hows).count(how) for how in HOWS)


def test_golden() -> None:
    """One rank, one micro-batch, three units of 100 bytes: 60 or 10 if made again, with 40 or 90 of one meanwhile."""
    schedule = build("1f1b", ranks=1, microbatches=1)
    want = {300: (3, 0, 0), 299: (1, 2, 0), 259: (0, 3, 0), 219: (1, 0, 2), 209: (0, 1, 2), 120: (0, 0, 3)}
    for room, counts in want.items():
        assert _counts(choose_recompute(schedule, [[BLOCK] * 3], [0], [room])[0]) == counts


def _peak(
    schedule: Schedule, rank: int, stages: Sequence[Sequence[UnitWays]], picked: Sequence[Sequence[Way]]
) -> float:
    """By walking through the rank's actions; and the most that one unit makes again."""
    held = peak = 0.0
    for op, stage, _ in schedule.actions[rank]:
        kept, waiting = sum(way.kept for way in picked[stage]), sum(unit.waiting for unit in stages[stage])
        held += {"F": kept, "B": waiting - kept, "W": -waiting, "BW": -kept}[op]
        peak = max(peak, held)
    own = schedule.stages_of(rank)
    again = [unit.ways[0].kept - way.kept for s in own for unit, way in zip(stages[s], picked[s], strict=True)]
    return peak + max(0.0, *again)


def _best(schedule: Schedule, rank: int, stages: Sequence[Sequence[UnitWays]], room: float) -> float | None:
    """The least time of all choices that fit, by trying all."""
    own = schedule.stages_of(rank)
    times = []
    for ways in product(*(unit.ways for stage in own for unit in stages[stage])):
        rest = iter(ways)
        picked = [[next(rest) for _ in units] if s in own else [] for s, units in enumerate(stages)]
        if _peak(schedule, rank, stages, picked) <= room:
            times.append(sum(way.added for way in ways))
    return min(times, default=None)


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "interleaved-1f1b", "zb-h1", "zb-v"])
def test_no_other_choice_is_better(name: str) -> None:
    """Units of random sizes and times under random limits, against all choices; refused where none fits."""
    schedule = build(name, ranks=2, microbatches=4)
    fits = refused = 0
    for trial in range(20):
        stages = [
            [
                _unit(
                    *((random.randint(0, 20), random.randint(0, 9)) for _ in range(3)),
                    waiting=random.randint(0, 9) if schedule.defers else 0,
                )
                for _ in range(4 // schedule.chunks)
            ]
            for _ in range(schedule.stages)
        ]
        fixed = [random.randint(2, 50) for _ in range(2)]
        limits = [random.randint(50, 300) for _ in range(2)] if trial else [1, 1]
        want = [_best(schedule, rank, stages, limits[rank] - fixed[rank]) for rank in range(2)]
        if None in want:
            refused += 1
            with pytest.raises(ConfigError, match=rf"rank {want.index(None)} needs"):
                choose_recompute(schedule, stages, fixed, limits)
            continue
        fits += 1
        hows = choose_recompute(schedule, stages, fixed, limits)
        picked = [
            [unit.ways[HOWS.index(how)] for unit, how in zip(units, row, strict=True)]
            for units, row in zip(stages, hows, strict=True)
        ]
        for rank, least in enumerate(want):
            assert _peak(schedule, rank, stages, picked) + fixed[rank] <= limits[rank]
            assert sum(way.added for stage in schedule.stages_of(rank) for way in picked[stage]) == least
    assert fits and refused


def test_a_limit_that_is_tightened_turns_units_on_one_after_the_other() -> None:
    """1f1b, four ranks: rank 0 holds four micro-batches and must save the most, the last one nothing."""
    schedule = build("1f1b", ranks=4, microbatches=8)
    block = _unit((100, 0), (100, 9), (10, 8))
    seen = [
        [_counts(row)[2] for row in choose_recompute(schedule, [[block] * 6] * 4, [0] * 4, [room] * 4)]
        for room in range(2400, 320, -30)
    ]
    assert seen[0] == [0, 0, 0, 0] and seen[-1][0] == 6
    assert all(a <= b for before, after in pairwise(seen) for a, b in zip(before, after, strict=True))
    assert all(row == sorted(row, reverse=True) for row in seen)
    assert {row[0] for row in seen} == set(range(7))


def test_nothing_runs_again_for_nothing() -> None:
    """A measured difference may be 0; where memory is enough, all is kept."""
    free = _unit((100, 0), (60, 0), (10, 8))
    assert choose_recompute(build("1f1b", ranks=1, microbatches=1), [[free] * 3], [0], [300]) == [["none"] * 3]


def test_many_different_units() -> None:
    """Fast, within the limit, and near the best: the time of a fraction of the units, the cheapest for their bytes."""
    schedule = build("1f1b", ranks=1, microbatches=4)
    units = [_unit((1000 + 7 * i * i, 0), (500, 40 + i), (10, 100 + i)) for i in range(60)]
    whole = sum(unit.ways[0].kept for unit in units)
    (hows,) = choose_recompute(schedule, [units], [0], [whole / 2])
    picked = [unit.ways[HOWS.index(how)] for unit, how in zip(units, hows, strict=True)]
    assert sum(way.kept for way in picked) <= whole / 2
    dearest = sum(100 + i for i in range(60))
    assert sum(way.added for way in picked) < dearest / 4


def test_what_does_not_fit_is_told() -> None:
    """By how much, and what it would take; which then fits, and not a byte less."""
    schedule = build("1f1b", ranks=2, microbatches=2)
    stages, fixed = [[BLOCK, BLOCK], [BLOCK]], [1000.0, 2000.0]
    with pytest.raises(ConfigError) as refusal:
        choose_recompute(schedule, stages, fixed, [1100, 9999])
    for part in ("rank 0 needs 1.104 KiB at least", "30 bytes more than its 1.074 KiB", "more ranks", "'v-min'"):
        assert part in str(refusal.value), str(refusal.value)
    assert "rank 1" not in str(refusal.value)
    assert choose_recompute(schedule, stages, fixed, [1130, 9999])[0] == ["full", "full"]
    with pytest.raises(ConfigError):
        choose_recompute(schedule, stages, fixed, [1129, 9999])
