from __future__ import annotations

import pytest

from pipekern.errors import ConfigError
from pipekern.schedule import build, pipedream_2bw
from tests.schedule.sample import assert_docstring_draws, row


def test_golden_rows() -> None:
    schedule = build("pipedream-2bw", ranks=2, microbatches=6)
    assert_docstring_draws(pipedream_2bw, schedule)
    assert row(schedule, 1) == "1F0 1BW0 1F1 1BW1 1F2 1BW2 1F3 1BW3 1F4 1BW4 1F5 1BW5"
    assert schedule.duplicates_weights and not schedule.synchronous and not schedule.runnable


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("more", [0, 1, 9])
def test_valid_over_a_grid(ranks: int, more: int) -> None:
    build("pipedream-2bw", ranks=ranks, microbatches=ranks + more).check()


def test_too_few_microbatches_for_two_versions() -> None:
    message = "microbatches=3: pipedream-2bw needs at least 4; nearest microbatches=4"
    with pytest.raises(ConfigError, match=message):
        build("pipedream-2bw", ranks=4, microbatches=3)
