from __future__ import annotations

from collections import deque
from collections.abc import Collection
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekern.errors import ConfigError, ScheduleError
from pipekern.schedule import Program, Schedule, build, comms, names
from tests.schedule.sample import random_schedule


def test_golden_program() -> None:
    program = build("1f1b", ranks=2, microbatches=2).program()
    assert [" ".join(map(str, row)) for row in program.instructions] == [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0BW0 0RECV_B1 0BW1",
        "1RECV_F0 1F0 1BW0 1SEND_B0 1RECV_F1 1F1 1BW1 1SEND_B1",
    ]
    assert program.slots == {(0, 1): 3, (1, 0): 2}
    assert len(program.order) == 16


def test_golden_skip() -> None:
    """From stage 0 to stage 2, past stage 1: received in the order of stages, its slots held until the last use."""
    program = build("1f1b", ranks=3, microbatches=2).program([(0, 2)])
    assert " ".join(map(str, program.instructions[0])).startswith(
        "0F0 0SEND_F0 0SEND_F0 0F1 0SEND_F1 0SEND_F1 0RECV_B0"
    )
    assert [one.peer for one in program.instructions[0][:6]] == [-1, 1, 2, -1, 1, 2]
    assert [one.edge for one in program.instructions[2][:2]] == [(1, 2), (0, 2)]
    back = [one for one in program.instructions[0] if one.op == "RECV_B"]
    assert [one.edge for one in back] == [(1, 0), (2, 0)] * 2
    assert program.slots == {(0, 1): 3, (0, 2): 3, (1, 0): 2, (1, 2): 3, (2, 0): 3, (2, 1): 2}


@pytest.mark.parametrize("skip", [(0, 1), (2, 0), (-1, 1), (0, 3), (1, 1)])
def test_a_skip_that_is_none(skip: tuple[int, int]) -> None:
    with pytest.raises(ScheduleError, match=f"from stage {skip[0]} to stage {skip[1]} of 3: give a stage"):
        build("1f1b", ranks=3, microbatches=2).program([skip])


def test_no_message_between_stages_of_one_rank() -> None:
    schedule = Schedule.parse("pipekern-schedule name=v microbatches=1 stage_rank=0,1,1,0\n0F0 3F0 3BW0 0BW0\n"
                              "1F0 2F0 2BW0 1BW0\n")  # fmt: skip
    assert sorted(schedule.program().slots) == [(0, 1), (1, 0), (2, 3), (3, 2)]


def test_weight_work_put_off_holds_its_slots() -> None:
    text = "pipekern-schedule name=w microbatches=2 stage_rank=0,1\n0F0 0F1 0B0 0B1 0W0 0W1\n1F0 1B0 1F1 1B1 1W0 1W1\n"
    assert Schedule.parse(text).program().slots == {(0, 1): 3, (1, 0): 3}


def test_a_slot_is_counted_until_the_messages_before_it_are_used() -> None:
    """Rank 1 uses micro-batch 0 last: until then no slot behind it can be reached, though two of them are free."""
    text = "pipekern-schedule name=x microbatches=4 stage_rank=0,1\n0F0 0F1 0F2 0BW1 0F3 0BW2 0BW3 0BW0\n"
    program = Schedule.parse(text + "1F0 1F1 1BW1 1F2 1BW2 1F3 1BW3 1BW0\n").program()
    assert program.slots[0, 1] == 4 + 1


def test_one_chunk_alone_needs_no_link() -> None:
    assert build("1f1b", ranks=1, microbatches=3).program().slots == {}


def test_a_link_is_received_in_the_order_of_its_sender() -> None:
    text = "pipekern-schedule name=x microbatches=2 stage_rank=0,1\n0F0 0F1 0BW0 0BW1\n1F1 1F0 1BW1 1BW0\n"
    program = Schedule.parse(text).program()
    assert " ".join(map(str, program.instructions[1])).startswith("1RECV_F0 1RECV_F1 1F1 1F0")
    assert " ".join(map(str, program.instructions[0])).endswith("0RECV_B1 0RECV_B0 0BW0 0BW1")


def test_too_few_slots_are_a_deadlock() -> None:
    schedule = build("gpipe", ranks=2, microbatches=3)
    program = schedule.program()
    spans = schedule.simulate(comms.UNIT).spans
    few = dict.fromkeys(program.slots, 1)
    with pytest.raises(ScheduleError, match=r"schedule deadlocks: 2 faults(.|\n)*link has 1 slots"):
        comms.bounded_order(schedule, program.instructions, few, spans)


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("name", names())
def test_every_schedule_runs_in_any_interleaving(name: str, forward: bool) -> None:
    random, seen = Random(), 0
    for ranks, rounds in ((1, 1), (1, 3), (2, 1), (2, 4), (3, 2), (4, 2), (5, 3)):
        try:
            schedule = build(name, ranks=ranks, microbatches=ranks * rounds)
        except ConfigError:  # not every schedule takes every size
            continue
        seen += 1
        verify(schedule.forward_only() if forward else schedule, random)
    assert seen


@given(st.integers(0, 2**32))
def test_random_schedules_run_in_any_interleaving(seed: int) -> None:
    random = Random(seed)
    schedule = random_schedule(random)
    for skips in ([], _some_skips(schedule, random)):
        verify(schedule, random, skips)
        verify(schedule.forward_only(), random, skips)


def _some_skips(schedule: Schedule, random: Random) -> list[tuple[int, int]]:
    """Pairs of stages of one chain with others between them."""
    pairs = [(a, b) for a in range(schedule.stages) for b in range(a + 2, schedule.stages)]
    return [(a, b) for a, b in pairs if a // schedule.depth == b // schedule.depth and random.random() < 0.5]


def verify(schedule: Schedule, random: Random, skips: Collection[tuple[int, int]] = ()) -> None:
    """The program has the schedule's actions, matches every message, and runs in its own order and in any other."""
    program = schedule.program(skips)
    home = schedule.stage_rank
    for a, b in skips:
        carried = [one.microbatch for one in program.instructions[home[a]] if one.op == "SEND_F" and one.edge == (a, b)]
        assert sorted(carried) == [i for i in range(schedule.units) if a in schedule.path(i) and home[a] != home[b]]
    computed = [[str(one) for one in row if "_" not in one.op] for row in program.instructions]
    assert computed == [[str(action) for action in row] for row in schedule.actions]
    every = [(rank, index) for rank, row in enumerate(program.instructions) for index in range(len(row))]
    assert sorted(program.order) == every
    run_in(program, list(program.order))
    run_in(program, None, random)


def run_in(program: Program, order: list[tuple[int, int]] | None, random: Random | None = None) -> None:
    """Execute with links that are rings of slots, written apart from the package's own run."""
    rows = program.instructions
    position = [0] * len(rows)
    sent: dict[tuple[int, int], deque[int]] = {edge: deque() for edge in program.slots}
    landed: dict[tuple[int, int], deque[int]] = {edge: deque() for edge in program.slots}
    rings: dict[tuple[int, int], dict[int, int]] = {edge: {} for edge in program.slots}  # micro-batch by slot
    sequence = dict.fromkeys(program.slots, 0)
    last = {(a.stage, a.microbatch): a.op for row in program.schedule.actions for a in row}

    def retry() -> None:
        for edge, queue in sent.items():
            while queue and (slot := sequence[edge] % program.slots[edge]) not in rings[edge]:
                sequence[edge] += 1
                rings[edge][slot] = queue[0]
                landed[edge].append(queue.popleft())

    def step(rank: int) -> bool:
        op, stage, microbatch, peer = rows[rank][position[rank]]
        if op.startswith("SEND"):
            assert (peer > stage) == (op == "SEND_F")
            sent[stage, peer].append(microbatch)
        elif op.startswith("RECV"):
            edge = peer, stage
            assert (peer < stage) == (op == "RECV_F")
            if not landed[edge]:
                return False
            assert landed[edge].popleft() == microbatch
        elif last[stage, microbatch] == op:
            for edge, ring in rings.items():
                if edge[1] == stage:
                    del ring[next(slot for slot, used_by in ring.items() if used_by == microbatch)]
        position[rank] += 1
        retry()
        return True

    if order is not None:
        for rank, index in order:
            assert position[rank] == index and step(rank)
    else:
        assert random is not None
        todo = [rank for rank, row in enumerate(rows) if row]
        while todo:
            random.shuffle(todo)
            assert any(step(rank) for rank in todo), "deadlock"
            todo = [rank for rank in todo if position[rank] < len(rows[rank])]
    assert position == [len(row) for row in rows] and not any(map(len, (*sent.values(), *landed.values())))
    assert not any(rings.values())
