from __future__ import annotations

import pytest

from pipekern.schedule import build, interleaved
from tests.schedule.sample import assert_docstring_draws, row


def test_golden_rows() -> None:
    schedule = build("interleaved-1f1b", ranks=2, microbatches=4)
    assert_docstring_draws(interleaved, schedule)
    assert row(schedule, 1) == "1F0 1F1 3F0 3BW0 3F1 3BW1 1F2 1BW0 1F3 1BW1 3F2 3BW2 3F3 3BW3 1BW2 1BW3"


def test_order_of_three_chunks() -> None:
    schedule = build("interleaved-1f1b", ranks=2, microbatches=4, chunks=3)
    forwards = row(schedule.forward_only(), 0)
    assert forwards == "0F0 0F1 2F0 2F1 4F0 4F1 0F2 0F3 2F2 2F3 4F2 4F3"
    warm_up = row(schedule, 0).split().index("4BW0") - 1
    assert warm_up == 2 * (2 - 0 - 1) + (3 - 1) * 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("chunks", [2, 3])
def test_valid_over_a_grid(ranks: int, rounds: int, chunks: int) -> None:
    schedule = build("interleaved-1f1b", ranks=ranks, microbatches=ranks * rounds, chunks=chunks)
    schedule.check()
    assert schedule.runnable and schedule.stage_rank == tuple(range(ranks)) * chunks and schedule.chunks == chunks
