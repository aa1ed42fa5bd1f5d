from __future__ import annotations

import pytest

from pipekern.schedule import build, zb_v
from tests.schedule.sample import assert_docstring_draws, row


def test_golden_rows() -> None:
    schedule = build("zb-v", ranks=2, microbatches=4)
    assert_docstring_draws(zb_v, schedule)
    assert schedule.stage_rank == (0, 1, 1, 0)
    assert row(schedule, 1) == (
        "1F0 2F0 1F1 2F1 2B0 2W0 1F2 1B0 1W0 2F2 2B1 2W1 1F3 1B1 1W1 2F3 2B2 2W2 1B2 2B3 1B3 1W2 2W3 1W3"
    )
    assert schedule.synchronous and not schedule.duplicates_weights and schedule.runnable


def test_with_few_microbatches_it_is_that_of_more_without_the_surplus() -> None:
    many, few = build("zb-v", ranks=3, microbatches=5), build("zb-v", ranks=3, microbatches=2)
    assert few.actions == tuple(tuple(a for a in actions if a.microbatch < 2) for actions in many.actions)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 7, 12, 20])
def test_valid_over_a_grid(ranks: int, microbatches: int) -> None:
    build("zb-v", ranks=ranks, microbatches=microbatches).check()
