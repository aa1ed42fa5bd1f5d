from __future__ import annotations

import pytest

from pipekern.schedule import build, gpipe
from tests.schedule.sample import assert_docstring_draws, row


def test_golden_rows() -> None:
    schedule = build("gpipe", ranks=3, microbatches=4)
    assert_docstring_draws(gpipe, schedule)
    assert row(schedule, 1) == "1F0 1F1 1F2 1F3 1BW0 1BW1 1BW2 1BW3"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_valid_over_a_grid(ranks: int, rounds: int) -> None:
    schedule = build("gpipe", ranks=ranks, microbatches=2 * rounds - 1)
    schedule.check()
    assert schedule.runnable and schedule.stage_rank == tuple(range(ranks))
