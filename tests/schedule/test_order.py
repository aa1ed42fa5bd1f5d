from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from pipekern.schedule import Action, Schedule
from pipekern.schedule.order import explain, needs, part_that_runs, sequential
from tests.schedule.sample import inputs, random_schedule

STUCK = Schedule.parse("""\
pipekern-schedule name=stuck microbatches=2 stage_rank=0,1
0F0 0F1 0B0 0W0 0BW1
1F0 1BW1 1F1 1BW0
""")


def test_golden_deadlock() -> None:
    order = sequential(STUCK)
    assert order.steps == [(0, 0), (0, 1), (1, 0)]
    assert explain(STUCK, order.stuck) == [
        "rank 0 stuck at 0B0 (instruction 2): waits for 1BW0",
        "rank 1 stuck at 1BW1 (instruction 1): waits for 1F1",
    ]
    assert [len(row) for row in part_that_runs(STUCK).actions] == [2, 1]


def test_needs() -> None:
    assert needs(STUCK, Action("F", 0, 1)) == ()
    assert needs(STUCK, Action("F", 1, 1)) == (Action("F", 0, 1),)
    assert needs(STUCK, Action("BW", 0, 1)) == (Action("F", 0, 1), Action("B", 1, 1))
    assert needs(STUCK, Action("W", 0, 1)) == (Action("B", 0, 1),)


@given(st.integers(0, 2**32))
def test_every_step_comes_after_what_it_needs(seed: int) -> None:
    schedule = random_schedule(Random(seed))
    order = sequential(schedule)
    assert not order.stuck
    assert sorted(order.steps) == [(r, i) for r, row in enumerate(schedule.actions) for i in range(len(row))]
    done: set[Action] = set()
    for rank, index in order.steps:
        action = schedule.actions[rank][index]
        assert all(any(Action(*one) in done for one in either) for either in inputs(schedule, action))
        done.add(action)
