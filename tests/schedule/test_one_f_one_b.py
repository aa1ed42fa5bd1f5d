from __future__ import annotations

import pytest

from pipekern.schedule import build, one_f_one_b
from tests.schedule.sample import assert_docstring_draws, row


def test_golden_rows() -> None:
    schedule = build("1f1b", ranks=3, microbatches=4)
    assert_docstring_draws(one_f_one_b, schedule)
    assert row(schedule, 0) == "0F0 0F1 0F2 0BW0 0F3 0BW1 0BW2 0BW3"
    assert row(schedule, 2) == "2F0 2BW0 2F1 2BW1 2F2 2BW2 2F3 2BW3"


def test_fewer_microbatches_than_ranks() -> None:
    schedule = build("1f1b", ranks=4, microbatches=2)
    assert [row(schedule, rank) for rank in range(4)] == [
        "0F0 0F1 0BW0 0BW1",
        "1F0 1F1 1BW0 1BW1",
        "2F0 2F1 2BW0 2BW1",
        "3F0 3BW0 3F1 3BW1",
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_valid_over_a_grid(ranks: int, rounds: int) -> None:
    schedule = build("1f1b", ranks=ranks, microbatches=2 * rounds - 1)
    schedule.check()
    assert schedule.runnable and schedule.stage_rank == tuple(range(ranks))
