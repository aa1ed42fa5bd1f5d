from __future__ import annotations

import pytest

from pipekern.errors import ConfigError
from pipekern.schedule import build, chimera
from tests.schedule.sample import assert_docstring_draws, row


def test_golden_rows() -> None:
    schedule = build("chimera", ranks=4, microbatches=8)
    assert_docstring_draws(chimera, schedule)
    assert row(schedule, 0) == "0F0 0F1 7F4 7BW4 7F5 7BW5 0BW0 0F2 0BW1 0F3 7F6 7BW6 7F7 7BW7 0BW2 0BW3"
    assert schedule.stage_rank == (0, 1, 2, 3, 3, 2, 1, 0)
    assert schedule.duplicates_weights and schedule.synchronous and not schedule.runnable


@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
@pytest.mark.parametrize("microbatches", [2, 4, 6, 8, 14, 24])
def test_valid_over_a_grid(ranks: int, microbatches: int) -> None:
    build("chimera", ranks=ranks, microbatches=microbatches).check()


@pytest.mark.parametrize(
    ("ranks", "microbatches", "message"),
    [(5, 10, "ranks=5: .* nearest ranks=6"), (4, 7, "microbatches=7: .* nearest microbatches=8")],
)
def test_wrong_sizes(ranks: int, microbatches: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("chimera", ranks=ranks, microbatches=microbatches)
