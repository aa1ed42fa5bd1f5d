from __future__ import annotations

import pytest

from pipekern.errors import ConfigError
from pipekern.schedule import build, zb_h2
from tests.schedule.sample import assert_docstring_draws, row


def test_golden_rows() -> None:
    schedule = build("zb-h2", ranks=3, microbatches=6)
    assert_docstring_draws(zb_h2, schedule)
    assert row(schedule, 0) == "0F0 0F1 0F2 0F3 0F4 0B0 0W0 0F5 0B1 0W1 0B2 0W2 0B3 0W3 0B4 0W4 0B5 0W5"
    assert row(schedule, 2) == "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 2F4 2B4 2W0 2F5 2B5 2W1 2W2 2W3 2W4 2W5"
    assert schedule.synchronous and not schedule.duplicates_weights and schedule.runnable


def test_with_the_memory_of_zb_h1_it_is_zb_h1() -> None:
    assert (
        build("zb-h2", ranks=4, microbatches=9, memory=4.5).actions == build("zb-h1", ranks=4, microbatches=9).actions
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 7, 12, 20])
def test_valid_over_a_grid(ranks: int, microbatches: int) -> None:
    for memory in (None, ranks, ranks + 1, 2 * ranks - 1, 1000):
        build("zb-h2", ranks=ranks, microbatches=microbatches, memory=memory).check()


def test_too_little_memory() -> None:
    with pytest.raises(ConfigError, match=r"memory=3.5: zb-h2 needs at least 4; nearest memory=4"):
        build("zb-h2", ranks=4, microbatches=8, memory=3.5)
    build("zb-h2", ranks=4, microbatches=3, memory=3)
