from __future__ import annotations

import pytest

from pipekern.schedule import build, looped_bfs
from tests.schedule.sample import assert_docstring_draws, row


def test_golden_rows() -> None:
    schedule = build("looped-bfs", ranks=2, microbatches=3)
    assert_docstring_draws(looped_bfs, schedule)
    assert row(schedule, 1) == "1F0 1F1 1F2 3F0 3F1 3F2 3BW0 3BW1 3BW2 1BW0 1BW1 1BW2"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("chunks", [2, 3])
def test_valid_over_a_grid(ranks: int, rounds: int, chunks: int) -> None:
    schedule = build("looped-bfs", ranks=ranks, microbatches=ranks * rounds, chunks=chunks)
    schedule.check()
    assert schedule.runnable and schedule.stage_rank == tuple(range(ranks)) * chunks and schedule.chunks == chunks
