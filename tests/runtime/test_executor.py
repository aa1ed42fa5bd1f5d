"""The walk through a program."""

from __future__ import annotations

from typing import Any

import pytest

from pipekern import schedule as schedules
from pipekern.runtime.executor import Executor, place
from tests.runtime.step import SCHEDULES

OPS = ("RECV_F", "F", "SEND_F", "RECV_B", "B", "W", "BW", "SEND_B")


class Runner:
    """Writes down what it is told to do."""

    def __init__(self, stage: int, last: bool, log: list[str], fail_at: str = ""):
        self.stage, self.scores, self.log, self.fail_at = stage, last, log, fail_at

    def lane(self, peer: int) -> Runner:
        return self

    def begin(self, batch: Any) -> None:
        self.log.append(f"{self.stage} begins {batch}")

    def __getattr__(self, op: str) -> Any:
        def act(microbatch: int) -> None:
            self.log.append(f"{self.stage}{op}{microbatch}")
            if self.log[-1] == self.fail_at:
                raise ValueError(op)

        return act


class Queue:
    """An outgoing queue that counts."""

    def __init__(self, log: list[str]):
        self.queued: dict[str, Any] = {"0>1": None}
        self.log, self.flushes = log, 0

    def flush(self) -> None:
        self.flushes += 1

    def drain(self) -> None:
        self.log.append("drain")


def _executor(
    schedule: str, ranks: int, microbatches: int, rank: int | None, fail_at: str = ""
) -> tuple[Any, list[str]]:
    order = schedules.build(schedule, ranks=ranks, microbatches=microbatches)
    log: list[str] = []
    here = range(order.stages) if rank is None else order.stages_of(rank)
    runners: Any = {stage: Runner(stage, stage == order.stages - 1, log, fail_at) for stage in here}
    queue: Any = Queue(log)
    after = lambda batch: log.append(f"loss of {batch}")  # noqa: E731
    return Executor(runners, order.program(), rank, {op: op for op in OPS}, queue, after), log


def test_golden() -> None:
    """Rank 1 of two, one micro-batch: the loss is told before the backward, and the queue emptied at the end."""
    executor, log = _executor("1f1b", 2, 1, rank=1)
    executor.run("x")
    assert log == ["1 begins x", "1RECV_F0", "1F0", "loss of x", "1BW0", "1SEND_B0", "drain"]
    assert len(executor.times) == 5
    assert executor.times == sorted(executor.times)


@SCHEDULES
@pytest.mark.parametrize("rank", [None, 0, 1, 2])
def test_it_does_what_the_program_says(schedule: str, rank: int | None) -> None:
    executor, log = _executor(schedule, 3, 6, rank)
    executor.run("x")
    program = schedules.build(schedule, ranks=3, microbatches=6).program()
    wanted = [f"{i.stage}{i.op}{i.microbatch}" for _, i in place(program, rank)]
    assert [line for line in log if not line.endswith(("x", "drain"))] == wanted
    assert len(executor.times) == len(wanted) + 1
    last = program.schedule.stages - 1
    assert log.count("loss of x") == (rank is None or program.schedule.stage_rank[last] == rank)
    if "loss of x" in log:
        told = log.index("loss of x")
        forwards = [k for k, line in enumerate(log) if line.startswith(f"{last}F")]
        assert forwards[-1] + 1 == told


@SCHEDULES
def test_one_thread_runs_every_ranks_instructions_in_their_order(schedule: str) -> None:
    """What is received was sent before."""
    program = schedules.build(schedule, ranks=3, microbatches=6).program()
    placed = place(program, None)
    for rank in range(3):
        assert [p for p in placed if p.rank == rank] == place(program, rank)
    done: set[tuple[str, int, int]] = set()
    for _, (op, stage, microbatch, _) in placed:
        if op == "RECV_F":
            assert ("SEND_F", stage - 1, microbatch) in done
        if op == "RECV_B":
            assert ("SEND_B", stage + 1, microbatch) in done
        done.add((op, stage, microbatch))


@pytest.mark.parametrize(
    ("fail_at", "where"),
    [
        ("0F0", "rank 0, stage 0, micro-batch 0, instruction 0 (F)"),
        ("0BW1", "rank 0, stage 0, micro-batch 1, instruction 7 (BW)"),
    ],
)
def test_where_it_was(fail_at: str, where: str) -> None:
    executor, _ = _executor("gpipe", 2, 2, 0, fail_at)
    assert executor.where() == "rank 0, before its first instruction"
    with pytest.raises(ValueError):
        executor.run("x")
    position = int(where.split("instruction ")[1].split(" ")[0])
    assert executor.placed[position].instruction.op == fail_at[1:-1]
    assert executor.where() == where
