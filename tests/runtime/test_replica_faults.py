"""A rank of one replica that dies or fails: every rank of every pipeline raises at once and says who."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.launch import launch
from tests.runtime.striking import Backward, strike

PP, DP, MICROBATCHES = 2, 2, 3
WITHIN = 2.0  # seconds until every rank knows


class Fault(NamedTuple):
    """What goes wrong on rank ``victim`` of the job, in the second step, and where: in a layer, or in a sum."""

    kind: str
    victim: int
    where: str
    zero: int
    transport: str
    stamp: str

    def strike(self) -> NoReturn:
        strike(self.stamp, killed=self.kind == "killed")


class Faulty(nn.Module):
    """A layer that works for a step and a micro-batch."""

    def __init__(self, fault: Fault | None):
        super().__init__()
        self.layer, self.fault, self.calls = nn.Linear(64, 64), fault, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.fault is not None and self.calls == MICROBATCHES + 2:
            if self.fault.where == "forward":
                self.fault.strike()
            if self.fault.where == "backward":
                return Backward.apply(self.layer(x), self.fault)
        return self.layer(x)


class Raised(NamedTuple):
    """What a rank saw."""

    kind: str
    rank: int
    text: str
    at: float
    second: str  # what the next call says


def _train(fault: Fault) -> Raised:
    rank = int(os.environ["RANK"])
    net = nn.Sequential(*(Faulty(fault if rank == fault.victim else None) for _ in range(PP)))
    pipe = pk.Pipeline(
        net, loss_fn=F.mse_loss, microbatches=MICROBATCHES, mesh={"dp": DP, "pp": PP}, zero=fault.zero,
        transport=fault.transport,
    )  # fmt: skip
    optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
    x = torch.ones(2 * MICROBATCHES, 64)
    if rank == fault.victim and fault.where == "sum":
        place = [action.op for _, action in pipe._parts.train.placed].index("REDUCE")
        steps, run = pipe._parts.train._steps, pipe._parts.train._steps[place][0]
        calls = []

        def reduce(bucket: int) -> None:
            calls.append(bucket)
            fault.strike() if len(calls) == 2 else run(bucket)

        steps[place] = (reduce, steps[place][1])
    try:
        for _ in range(3):
            optimizer.zero_grad()
            pipe.train_step(x, x)
            optimizer.step()
    except (pk.TransportError, ValueError) as error:
        at = time.monotonic()
        text = "\n".join([str(error), *getattr(error, "__notes__", [])])
        try:
            pipe.train_step(x, x)
            second = "nothing"
        except pk.TransportError as again:
            second = str(again)
        return Raised(type(error).__name__, getattr(error, "rank", -1), text, at, second)
    raise AssertionError("nothing was raised")


def _strike(fault: Fault) -> None:
    outcomes = launch(_train, PP * DP, fault, timeout=40)
    struck = float(Path(fault.stamp).read_text())
    for outcome in outcomes:
        if outcome.rank == fault.victim and fault.kind == "killed":
            assert outcome.error is not None and "killed by signal 9" in outcome.error
            continue
        assert outcome.error is None, f"rank {outcome.rank}: {outcome.error}\n{outcome.output}"
        raised: Raised = outcome.value
        assert raised.at - struck < WITHIN, f"rank {outcome.rank} raised after {raised.at - struck:.1f} s"
        assert "closed" in raised.second
        if outcome.rank == fault.victim:
            assert raised.kind == "ValueError"
            continue
        assert raised.rank == fault.victim and f"rank {fault.victim}" in raised.text, raised.text
        if fault.kind == "killed":
            assert raised.kind == "PeerDied", raised.text
        else:
            assert raised.kind == "Aborted", raised.text
            wanted = ["Traceback", "strike", "ValueError: a fault in the user's code"]
            assert [part for part in wanted if part not in raised.text] == [], raised.text


KINDS, PLACES = ("killed", "failed"), ("forward", "backward", "sum")
SAMPLE = [("killed", 1, "forward", 0), ("killed", 2, "sum", 1), ("killed", 3, "backward", 3), ("failed", 0, "sum", 0),
          ("failed", 3, "forward", 2), ("failed", 1, "backward", 1)]  # fmt: skip


@pytest.mark.parametrize(("kind", "victim", "where", "zero"), SAMPLE)
def test_over_shared_memory(kind: str, victim: int, where: str, zero: int, tmp_path: Path) -> None:
    _strike(Fault(kind, victim, where, zero, "shm", str(tmp_path / "stamp")))


@pytest.mark.parametrize(("kind", "victim", "where", "zero"), [SAMPLE[1], SAMPLE[4]])
def test_over_torch_distributed(kind: str, victim: int, where: str, zero: int, tmp_path: Path) -> None:
    _strike(Fault(kind, victim, where, zero, "dist", str(tmp_path / "stamp")))


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["shm", "dist"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_and_place(kind: str, transport: str, tmp_path: Path) -> None:
    """Without a retry."""
    for victim, where, zero in product(range(PP * DP), PLACES, range(4)):
        _strike(Fault(kind, victim, where, zero, transport, str(tmp_path / "stamp")))


def _leave(stamp: str) -> None:
    """A program that an exception ends, as a user's: the interpreter itself goes to its end."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=40)
    Path(f"{stamp}{os.environ['RANK']}").write_text(done.stderr)
    assert done.returncode == 1, (done.returncode, done.stderr)


_PROGRAM = """
import os, time, torch
from torch import nn
import pipekern as pk
class Bad(nn.Linear):
    def forward(self, x):
        if os.environ["RANK"] == "1":
            time.sleep(1)  # meanwhile the other one has begun its sum
            raise ValueError("a fault in the user's code")
        return super().forward(x)
pipe = pk.Pipeline(nn.Sequential(Bad(4, 4)), loss_fn=nn.MSELoss(), microbatches=1, mesh={"dp": 2})
pipe.train_step(torch.ones(4, 4), torch.ones(4, 4))
"""


@pytest.mark.full
def test_processes_end(tmp_path: Path) -> None:
    """Also with a sum begun that the other replica will never join."""
    outcomes = launch(_leave, 2, str(tmp_path / "stderr"), timeout=60)
    assert [outcome.error for outcome in outcomes] == [None] * 2
    survivor, failed = ((tmp_path / f"stderr{rank}").read_text() for rank in range(2))
    assert "Aborted" in survivor and "a fault in the user's code" in survivor
    assert "ValueError: a fault in the user's code" in failed
