from __future__ import annotations

import pytest

from pipekern.schedule import build, zb_h1
from tests.schedule.sample import assert_docstring_draws, row


def test_golden_rows() -> None:
    schedule = build("zb-h1", ranks=3, microbatches=4)
    assert_docstring_draws(zb_h1, schedule)
    assert row(schedule, 0) == "0F0 0F1 0F2 0B0 0W0 0F3 0B1 0W1 0B2 0W2 0B3 0W3"
    assert row(schedule, 2) == "2F0 2B0 2F1 2B1 2F2 2B2 2W0 2F3 2B3 2W1 2W2 2W3"
    assert schedule.synchronous and not schedule.duplicates_weights and schedule.runnable


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 7, 12])
def test_valid_over_a_grid(ranks: int, microbatches: int) -> None:
    build("zb-h1", ranks=ranks, microbatches=microbatches).check()
