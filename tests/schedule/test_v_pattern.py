"""v-half and v-min: one way to a schedule from a block of six steps."""

from __future__ import annotations

import pytest

from pipekern.schedule import Costs, build, v_half, v_min
from tests.schedule.sample import assert_docstring_draws, row

CHUNK = Costs(2, 2, 2)


def test_golden_v_half() -> None:
    schedule = build("v-half", ranks=2, microbatches=4)
    assert_docstring_draws(v_half, schedule)
    assert schedule.stage_rank == (0, 1, 1, 0)
    assert row(schedule, 0).startswith("0F0 0F1 0F2 3F0 3B0 3W0 3F1 3B1 0B0 0W0")


def test_golden_v_min() -> None:
    schedule = build("v-min", ranks=3, microbatches=3)
    assert_docstring_draws(v_min, schedule)
    assert row(schedule, 2).startswith("2F0 3F0 2F1 3F1 3B0 2B0 3W0 2W0")


def test_no_more_memory_than_the_repeated_block() -> None:
    """With three times the ranks v-min holds a third of what 1f1b does, v-half a half."""
    assert build("v-half", ranks=12, microbatches=30).simulate(CHUNK).peak_activations == [7] * 12
    assert build("v-min", ranks=12, microbatches=30).simulate(CHUNK).peak_activations == [5] * 12
    assert max(build("1f1b", ranks=12, microbatches=30).simulate(CHUNK).peak_activations) == 12


@pytest.mark.parametrize("name", ["v-half", "v-min"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 9])
def test_valid_over_a_grid(name: str, ranks: int) -> None:
    for microbatches in (1, 2, 3, 7, 12, 20):
        schedule = build(name, ranks=ranks, microbatches=microbatches)
        schedule.check()
        assert schedule.synchronous and not schedule.duplicates_weights and schedule.runnable


@pytest.mark.full
@pytest.mark.parametrize("name", ["v-half", "v-min"])
@pytest.mark.parametrize("ranks", range(1, 41))
def test_the_block_fits_and_the_law_is_reached_for_any_number_of_ranks(name: str, ranks: int) -> None:
    schedule = build(name, ranks=ranks, microbatches=2 * ranks)
    schedule.check()
    timeline = schedule.simulate(CHUNK)
    memory = (ranks + 2) // 2 if name == "v-half" else (ranks + 4) // 3
    assert max(timeline.peak_activations) <= memory
    if ranks > 2:
        assert timeline.span - timeline.busy[0] == 6 * ranks - 1 - 6 * memory
