from __future__ import annotations

import pytest

from pipekern.errors import ConfigError
from pipekern.schedule import Costs, build, dualpipev
from tests.schedule.sample import assert_docstring_lists


def test_golden_rows() -> None:
    schedule = build("dualpipev", ranks=2, microbatches=5)
    assert_docstring_lists(dualpipev, schedule)
    assert schedule.stage_rank == (0, 1, 1, 0)
    assert schedule.synchronous and not schedule.duplicates_weights and schedule.runnable


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("more", [0, 1, 5])
def test_over_a_grid(ranks: int, more: int) -> None:
    """The bubble is that of DualPipe with twice the ranks, in the times of a chunk."""
    schedule = build("dualpipev", ranks=ranks, microbatches=2 * ranks + more)
    schedule.check()
    timeline = schedule.simulate(Costs(14, 14, 14, pair=42))
    assert timeline.makespan - min(timeline.busy) == (ranks - 1) * (21 + 14 - 3 * 7)
    assert 2 * max(timeline.peak_activations) == 2 * ranks + 1
    assert timeline.messages == 4 * (2 * ranks + more) * (ranks - 1)


def test_wrong_size() -> None:
    with pytest.raises(ConfigError, match="microbatches=5: dualpipev needs at least 6; nearest microbatches=6"):
        build("dualpipev", ranks=3, microbatches=5)
