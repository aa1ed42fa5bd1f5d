"""An exception in any instruction of any rank: all ranks raise it at once, with the root's traceback and its place."""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pipekern as pk
from tests.launch import launch, values

RANKS, MICROBATCHES = 2, 3
WITHIN = 2.0  # seconds until every rank knows


class Seen(NamedTuple):
    """What one rank raised, and when."""

    kind: str
    text: str
    at: float


def _pipe(schedule: str, transport: str) -> pk.Pipeline:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    return pk.Pipeline(
        net, loss_fn=F.mse_loss, microbatches=MICROBATCHES, ranks=RANKS, schedule=schedule, transport=transport
    )


def _fail(microbatch: int) -> None:
    raise ValueError(f"a fault in micro-batch {microbatch}")


def _try_all(schedule: str, transport: str) -> list[Seen]:
    """One pipeline after the other in the same processes, a fault in the next instruction each time."""
    rank, seen = int(os.environ["RANK"]), []
    x = torch.randn(6, 4)
    for victim, index in _places(schedule):
        pipe = _pipe(schedule, transport)
        steps = pipe._parts.train._steps
        if rank == victim:
            steps[index] = (_fail, steps[index][1])
        try:
            pipe.train_step(x, x)
            pipe.clip_grad_norm_(1.0)  # a rank that was done with the step before the fault learns of it here
            seen.append(Seen("nothing", "", time.monotonic()))
        except Exception as error:
            notes = getattr(error, "__notes__", [])
            seen.append(Seen(type(error).__name__, "\n".join([str(error), *notes]), time.monotonic()))
    return seen


def _places(schedule: str) -> list[tuple[int, int]]:
    rows = pk.schedule.build(schedule, ranks=RANKS, microbatches=MICROBATCHES).program().instructions
    return [(rank, index) for rank, row in enumerate(rows) for index in range(len(row))]


@pytest.mark.parametrize("transport", ["shm", pytest.param("dist", marks=pytest.mark.full)])
@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("zb-v", marks=pytest.mark.full)])
def test_every_instruction_of_every_rank(schedule: str, transport: str) -> None:
    columns: list[list[Seen]] = values(launch(_try_all, RANKS, schedule, transport, timeout=120.0))
    rows: Any = pk.schedule.build(schedule, ranks=RANKS, microbatches=MICROBATCHES).program().instructions
    for (victim, index), *seen in zip(_places(schedule), *columns, strict=True):
        instruction = rows[victim][index]
        root, other = seen[victim], seen[1 - victim]
        place = f"rank {victim}, stage {instruction.stage}, micro-batch {instruction.microbatch}, instruction {index}"
        assert root.kind == "ValueError" and place in root.text, (place, root)
        assert other.kind == "Aborted" and f"a fault in micro-batch {instruction.microbatch}" in other.text, other
        assert "in _fail" in other.text and place in other.text, other
        assert abs(other.at - root.at) < WITHIN, (place, root, other)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_in_one_process_the_pipeline_can_be_used_again(schedule: str) -> None:
    """The step after a fault has the gradients of an undisturbed one."""
    x, wanted = torch.randn(6, 4), None
    pipe = _pipe(schedule, "local")
    steps = pipe._parts.train._steps
    for index in range(-1, len(steps)):
        if index >= 0:
            kept = steps[index]
            steps[index] = (_fail, kept[1])
            with pytest.raises(ValueError, match="a fault"):
                pipe.train_step(x, x)
            steps[index] = kept
        for parameter in pipe.parameters():
            parameter.grad = None
        pipe.train_step(x, x)
        grads = [p.grad.clone() for p in pipe.parameters() if p.grad is not None]
        wanted = wanted or grads
        assert len(grads) == 8 and all(map(torch.equal, grads, wanted)), index
