from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekern.errors import ScheduleError
from pipekern.schedule import Action, Schedule
from tests.schedule.sample import random_schedule

TEXT = """\
pipekern-schedule name=1f1b microbatches=2 stage_rank=0,1
0F0 0F1 0BW0 0BW1
1F0 1BW0 1F1 1BW1
"""


def test_golden_text_form() -> None:
    schedule = Schedule.parse(TEXT)
    assert schedule.actions[1] == (Action("F", 1, 0), Action("BW", 1, 0), Action("F", 1, 1), Action("BW", 1, 1))
    assert (schedule.ranks, schedule.stages, schedule.microbatches, schedule.chunks) == (2, 2, 2, 1)
    assert schedule.runnable and schedule.synchronous and not schedule.duplicates_weights
    assert str(schedule) == TEXT


@given(st.integers(0, 2**32), st.booleans())
def test_text_form_round_trip(seed: int, synchronous: bool) -> None:
    random = Random(seed)
    plain = random_schedule(random)
    pairs = [row[i] for row in plain.actions for i in range(len(row) - 1) if (row[i].op, row[i + 1].op) == ("F", "BW")]
    chosen = frozenset(random.sample(pairs, random.randint(0, len(pairs))))
    schedule = replace(plain, name="my schedule=1", pairs=chosen, synchronous=synchronous)
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.parse("# a comment\n" + str(schedule) + "# another\n\n") == schedule


def test_two_directions() -> None:
    schedule = Schedule.parse(
        "pipekern-schedule name=two microbatches=2 stage_rank=0,1,1,0 chains=2\n0F0 3F1&0BW0 3BW1\n2F1 1F0&2BW1 1BW0\n"
    )
    assert schedule.pairs == {Action("F", 3, 1), Action("F", 1, 0)}
    assert [schedule.next_stage(stage) for stage in range(4)] == [1, None, 3, None]
    assert [schedule.previous_stage(stage) for stage in range(4)] == [None, 0, None, 2]
    assert [list(schedule.path(microbatch)) for microbatch in range(2)] == [[0, 1], [2, 3]]
    assert (schedule.depth, schedule.chunks, schedule.duplicates_weights, schedule.runnable) == (2, 1, True, False)


def test_forward_only_keeps_the_order_of_the_forwards() -> None:
    forward = Schedule.parse(TEXT).forward_only()
    assert str(forward).splitlines()[1:] == ["0F0 0F1", "1F0 1F1"]
    assert not forward.trains and Schedule.parse(TEXT).trains


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("", "first line ''"),
        ("pipekern-schedule name=x\n0F0", "first line"),
        (TEXT + "0X0\n", "'0X0' is not an action"),
        (TEXT.replace("1F1", "1F"), "'1F' is not an action"),
        (TEXT.replace("1F1", "1F1&"), "'' is not an action"),
    ],
)
def test_parse_names_what_it_cannot_read(text: str, culprit: str) -> None:
    with pytest.raises(ScheduleError, match=culprit):
        Schedule.parse(text)
