from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekern.errors import ScheduleError
from pipekern.schedule import Action, Schedule, build, check
from tests.schedule.sample import random_schedule

HEAD = "pipekern-schedule name=x microbatches=2 stage_rank=0,1\n"


def faults(schedule: Schedule) -> list[str]:
    with pytest.raises(ScheduleError) as caught:
        schedule.check()
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    return caught.value.faults


def test_golden_deadlock_message() -> None:
    schedule = Schedule.parse(HEAD + "0F0 0F1 0B0 0B1 0W0 0W1\n1B1 1F0 1B0 1F1 1W0 1W1\n")
    with pytest.raises(ScheduleError) as caught:
        check(schedule)
    assert str(caught.value) == (
        "schedule deadlocks: 2 faults\n"
        "  * rank 0 stuck at 0B0 (instruction 2): waits for 1B0\n"
        "  * rank 1 stuck at 1B1 (instruction 0): waits for 1F1\n"
        "draw it with `pipekern schedule show FILE`"
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("0F0 0F1 0BW0\n1F0 1BW0 1F1 1BW1", ["rank 0 lacks 0BW1"]),
        ("0F0 0F1 0BW0 0BW1\n1F0 1BW0 1BW1", ["rank 1 lacks 1F1"]),
        ("0F0 0F1 0BW0 0B1\n1F0 1BW0 1F1 1BW1", ["rank 0 lacks 0W1"]),
        ("0F0 0F1 0BW0 0W1\n1F0 1BW0 1F1 1BW1", ["rank 0 lacks 0B1"]),
        ("0F0 0F1 0BW0 0BW1 0F0\n1F0 1BW0 1F1 1BW1", ["0F0 runs 2 times"]),
        ("0F0 0F1 0BW0 0BW1 0B1\n1F0 1BW0 1F1 1BW1", ["0BW1 is mixed with 0B1"]),
        ("0F0 0F1 1F1 0BW0 0BW1\n1F0 1BW0 1BW1", ["rank 0 runs 1F1, but stage 1 is on rank 1"]),
        ("0F0 0F1 0BW0 0BW1 0F2\n1F0 1BW0 1F1 1BW1", ["rank 0 runs 0F2, but there are 2 micro-batches"]),
        ("0F0 0F1 0BW0 0BW1\n1F0 1BW0 1F1 1BW1 2F0", ["rank 1 runs 2F0, but there are 2 stages"]),
        ("0F0 0F1 0W0 0B0 0BW1\n1F0 1BW0 1F1 1BW1", ["rank 0 stuck at 0W0 (instruction 2): waits for 0B0"]),
        ("0F0&0F1 0BW0 0BW1\n1F0 1BW0 1F1 1BW1", ["rank 0: 0F0 (instruction 0) is no forward with a BW after it"]),
    ],
)
def test_each_fault(rows: str, expected: list[str]) -> None:
    found = faults(Schedule.parse(f"{HEAD}{rows}\n"))
    assert len(found) == len(expected)
    for fault, start in zip(found, expected, strict=True):
        assert fault.startswith(start)


def test_every_fault_is_listed() -> None:
    found = faults(Schedule.parse(HEAD + "0F0 0F0 0W1 0B1 0BW0 7F0\n1F0 1BW0 1B0 1BW1 1F1\n"))
    assert [fault.split(" (")[0] for fault in found] == [
        "rank 0 runs 7F0, but there are 2 stages",
        "0F0 runs 2 times",
        "1BW0 is mixed with 1B0: either the whole backward or its two parts",
        "rank 0 lacks 0F1",
        "rank 0 stuck at 0W1",
        "rank 1 stuck at 1BW1",
    ]


@pytest.mark.parametrize(
    ("head", "rows", "expected"),
    [
        ("microbatches=1 stage_rank=0,2", "0F0\n1F0", "stage 1 is on rank 2"),
        ("microbatches=1 stage_rank=0,0", "0F0 1F0\n", "stage 0"),
        ("microbatches=0 stage_rank=0", "", "microbatches=0"),
        ("microbatches=1 stage_rank=0,1,1 chains=2", "0F0\n1F0 2F0", "3 stages do not form chains=2"),
    ],
)
def test_wrong_shape(head: str, rows: str, expected: str) -> None:
    schedule = Schedule.parse(f"pipekern-schedule name=x {head}\n{rows}\n")
    if expected == "stage 0":
        schedule, expected = replace(schedule, actions=(*schedule.actions, ())), "rank 1 has a row but no stage"
    assert any(fault.startswith(expected) for fault in faults(schedule))


def test_a_forward_order_needs_no_backward() -> None:
    build("gpipe", ranks=3, microbatches=2).forward_only().check()


def test_two_directions_go_through_their_own_stages() -> None:
    text = "pipekern-schedule name=two microbatches=2 stage_rank=0,1,1,0 chains=2\n"
    Schedule.parse(text + "0F0 3F1 3BW1 0BW0\n2F1 1F0 1BW0 2BW1\n").check()
    wrong = Schedule.parse(text + "0F0 3F1 3BW1 0BW0\n2F1 1F0 1F1 1BW0 2BW1\n")
    assert faults(wrong)[0] == "rank 1 runs 1F1, but micro-batch 1 goes through stages 2 to 3"


def drop(random: Random, rows: list[list[Action]]) -> None:
    row = random.choice([row for row in rows if row])
    row.pop(random.randrange(len(row)))


def double(random: Random, rows: list[list[Action]]) -> None:
    row = random.choice([row for row in rows if row])
    row.insert(random.randrange(len(row) + 1), random.choice(row))


def move(random: Random, rows: list[list[Action]]) -> None:
    source, target = random.sample(range(len(rows)), 2)
    rows[target].append(rows[source].pop(random.randrange(len(rows[source]))))


def relabel(random: Random, rows: list[list[Action]]) -> None:
    row = random.choice([row for row in rows if row])
    index = random.randrange(len(row))
    op, stage, microbatch = row[index]
    other = random.choice([o for o in ("F", "B", "W", "BW") if o != op])
    row[index] = Action(other, stage, microbatch)


def backward_first(random: Random, rows: list[list[Action]]) -> None:
    row = random.choice([row for row in rows if row])
    action = random.choice([a for a in row if a.op == "F"])
    own = next(a for a in row if a.stage == action.stage and a.microbatch == action.microbatch and a.op in ("B", "BW"))
    i, j = row.index(action), row.index(own)
    row[i], row[j] = own, action


@pytest.mark.parametrize("mutate", [drop, double, relabel, backward_first, move])
@given(seed=st.integers(0, 2**32))
def test_every_mutant_is_caught(mutate: Callable[[Random, list[list[Action]]], None], seed: int) -> None:
    random = Random(seed)
    schedule = random_schedule(random)
    schedule.check()
    if mutate is move and schedule.ranks == 1:
        return
    rows = [list(row) for row in schedule.actions]
    mutate(random, rows)
    mutant = replace(schedule, actions=tuple(map(tuple, rows)))
    if mutant.trains:  # without its only backward it is a forward order, and a good one
        assert faults(mutant)


@given(seed=st.integers(0, 2**32))
def test_any_shuffle_is_either_run_or_explained(seed: int) -> None:
    random = Random(seed)
    schedule = random_schedule(random)
    rows = [list(row) for row in schedule.actions]
    row = random.choice(rows)
    random.shuffle(row)
    try:
        program = replace(schedule, actions=tuple(map(tuple, rows))).program()
        assert len(program.order) == sum(map(len, program.instructions))
    except ScheduleError as error:
        assert error.faults and all("stuck at" in fault or "before" in fault for fault in error.faults)
