from __future__ import annotations

import pytest

from pipekern.errors import ConfigError
from pipekern.schedule import Costs, build, hanayo
from tests.schedule.sample import assert_docstring_draws, row


def test_golden_rows() -> None:
    schedule = build("hanayo", ranks=2, microbatches=2, chunks=4)
    assert_docstring_draws(hanayo, schedule)
    assert schedule.stage_rank == (0, 1, 1, 0, 0, 1, 1, 0)
    assert row(schedule, 1) == ("1F0 2F0 1F1 2F1 5F0 6F0 5F1 6F1 6BW0 5BW0 6BW1 5BW1 2BW0 1BW0 2BW1 1BW1")
    assert schedule.runnable and schedule.synchronous and not schedule.duplicates_weights


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("chunks", [2, 4, 6])
def test_valid_over_a_grid(ranks: int, chunks: int) -> None:
    for microbatches in (1, 2, 3, 5, 8):
        build("hanayo", ranks=ranks, microbatches=microbatches, chunks=chunks).check()


@pytest.mark.parametrize("microbatches", [4, 8, 20])
def test_a_cap_on_memory_holds(microbatches: int) -> None:
    for memory in (1, 2.5, 4, 100):
        schedule = build("hanayo", ranks=4, microbatches=microbatches, chunks=2, memory=memory)
        schedule.check()
        assert max(schedule.simulate(Costs(1, 1, 1)).peak_activations) <= memory
    with pytest.raises(ConfigError, match=r"memory=0.5: hanayo needs at least 1; nearest memory=1"):
        build("hanayo", ranks=4, microbatches=microbatches, memory=0.5)


def test_more_microbatches_hold_less_than_twice_the_ranks() -> None:
    for microbatches in (8, 16, 64):
        timeline = build("hanayo", ranks=4, microbatches=microbatches).simulate(Costs(1, 1, 1))
        assert 4 < max(timeline.peak_activations) < 8


@pytest.mark.parametrize(("chunks", "nearest"), [(1, 2), (3, 2), (5, 4)])
def test_wrong_chunks(chunks: int, nearest: int) -> None:
    message = f"chunks={chunks}: hanayo needs a multiple of 2 a rank; nearest chunks={nearest}"
    with pytest.raises(ConfigError, match=message):
        build("hanayo", ranks=2, microbatches=2, chunks=chunks)
