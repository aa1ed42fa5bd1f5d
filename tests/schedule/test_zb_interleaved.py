from __future__ import annotations

import pytest

from pipekern.schedule import Costs, build, zb_interleaved
from tests.schedule.sample import assert_docstring_draws, row


def test_golden_rows() -> None:
    schedule = build("zb-interleaved", ranks=2, microbatches=4)
    assert_docstring_draws(zb_interleaved, schedule)
    assert row(schedule, 1).startswith("1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 3W0 1F3 1B1 3W1")
    assert schedule.synchronous and not schedule.duplicates_weights and schedule.runnable and schedule.defers


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_bubble_and_peak_over_a_grid(ranks: int, rounds: int, chunks: int) -> None:
    microbatches = ranks * rounds
    schedule = build("zb-interleaved", ranks=ranks, microbatches=microbatches, chunks=chunks)
    schedule.check()
    timeline = schedule.simulate(Costs(1, 1, 1))
    assert timeline.makespan == pytest.approx(3 * microbatches + (ranks - 1) / chunks, rel=1e-12)
    plain = build("interleaved-1f1b", ranks=ranks, microbatches=microbatches, chunks=chunks)
    assert max(timeline.peak_activations) <= max(plain.simulate(Costs(1, 1, 1)).peak_activations)
