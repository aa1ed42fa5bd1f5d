from __future__ import annotations

import pytest

from pipekern.errors import ConfigError, ScheduleError
from pipekern.schedule import Costs, Schedule, build, seq1f1b
from tests.schedule.sample import assert_docstring_draws, row


def test_golden_rows() -> None:
    schedule = build("seq1f1b", ranks=2, microbatches=3)
    assert_docstring_draws(seq1f1b, schedule)
    assert row(schedule, 0) == "0F0 0F1 0F2 0BW1 0F3 0BW0 0F4 0BW3 0F5 0BW2 0BW5 0BW4"
    assert (schedule.slices, schedule.microbatches, schedule.units) == (2, 3, 6)
    assert schedule.synchronous and not schedule.duplicates_weights and not schedule.runnable


def test_text_form() -> None:
    schedule = build("seq1f1b", ranks=2, microbatches=3, chunks=3)
    assert str(schedule).startswith("pipekern-schedule name=seq1f1b microbatches=3 stage_rank=0,1 slices=3\n")
    assert Schedule.parse(str(schedule)) == schedule


def test_costs_and_memory_are_those_of_whole_microbatches() -> None:
    timeline = build("seq1f1b", ranks=1, microbatches=2, chunks=4).simulate(Costs([4], 8, 4))
    assert timeline.of_rank(0)[0].end == 1
    assert (timeline.busy, timeline.peak_activations) == ([32], [1])


def test_a_slice_waits_for_its_neighbour_on_the_same_stage() -> None:
    text = "pipekern-schedule name=x microbatches=1 stage_rank=0 slices=2\n"
    Schedule.parse(text + "0F0 0F1 0BW1 0BW0\n").check()
    with pytest.raises(ScheduleError, match=r"rank 0 stuck at 0BW0 \(instruction 2\): waits for 0BW1"):
        Schedule.parse(text + "0F0 0F1 0BW0 0BW1\n").check()
    with pytest.raises(ScheduleError, match=r"rank 0 stuck at 0F1 \(instruction 0\): waits for 0F0"):
        Schedule.parse(text + "0F1 0F0 0BW1 0BW0\n").check()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("slices", [2, 3, 4])
def test_valid_over_a_grid(ranks: int, slices: int) -> None:
    for microbatches in (1, 2, 3, 7, 12):
        build("seq1f1b", ranks=ranks, microbatches=microbatches, chunks=slices).check()


def test_wrong_slices() -> None:
    with pytest.raises(ConfigError, match="chunks=1: seq1f1b needs at least 2 slices a micro-batch; nearest chunks=2"):
        build("seq1f1b", ranks=2, microbatches=2, chunks=1)
