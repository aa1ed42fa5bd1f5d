"""Training that is killed and goes on from its checkpoint is the training that was never killed, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from pipekern.checkpoint.load import Checkpoint
from tests.launch import launch, values
from tests.runtime.step import union

RANKS, MICROBATCHES, STEPS, EVERY = 2, 4, 9, 2
FORWARDS = STEPS * MICROBATCHES


class Mortal(nn.Module):
    """A layer that kills its process in forward number ``last``."""

    def __init__(self, last: int | None):
        super().__init__()
        self._last, self._calls = last, 0

    def forward(self, x: Tensor) -> Tensor:
        self._calls += 1
        if self._calls == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        return x


class Trained(NamedTuple):
    """From which step on, the losses, and the state at the end."""

    start: int
    losses: list[Tensor]
    state: dict[str, Tensor]


def _model(deaths: list[int | None]) -> nn.Sequential:
    block = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.GELU()]
    first, last = map(Mortal, deaths)
    return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), first, *block, last, nn.Linear(8, 4))


def _train(folder: str, seed: int, victim: int, death: int | None) -> Trained:
    """All steps that are left, by random batches of three generators; saves after every second one."""
    rank = int(os.environ["RANK"])
    _seed(seed)
    model = _model([death if rank == victim == place else None for place in range(RANKS)])
    with pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=MICROBATCHES, split=[5, 4], timeout=20.0) as pipe:
        optimizer = pipe.optimizer(torch.optim.AdamW, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        data: dict[str, Any] = {"step": 0, "scheduler": None}
        if Path(folder).exists():
            data = pipe.load(folder)
            scheduler.load_state_dict(data["scheduler"])
        start, losses = data["step"], []
        for step in range(start, STEPS):
            x = torch.randn(8, 5) + random.random() + np.random.normal()
            losses.append(pipe.train_step(x, torch.randn(8, 4)))
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if step % EVERY == EVERY - 1:
                state = {k: v for k, v in scheduler.state_dict().items() if isinstance(v, int | float | list)}
                pipe.save(folder, {"step": step + 1, "scheduler": state})
        return Trained(start, losses, {name: value.clone() for name, value in pipe.state_dict().items()})


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.full)])
def test_killed_in_the_middle_and_resumed(times: int, seed: int, tmp_path: Path) -> None:
    """Killed in a random forward of a random rank, after the first save; dropout, batches, rate and moments go on."""
    whole = values(launch(_train, RANKS, str(tmp_path / "whole"), seed, 0, None))
    for number in range(times):
        folder, victim = str(tmp_path / str(number)), random.randrange(RANKS)
        death = random.randint(EVERY * MICROBATCHES + 1, FORWARDS)
        killed = launch(_train, RANKS, folder, seed, victim, death)
        assert killed[victim].exitcode == -signal.SIGKILL, killed[victim].error
        assert "PeerDied" in (killed[1 - victim].error or "")
        again = values(launch(_train, RANKS, folder, seed + 1, 0, None))
        done = (death - 1) // MICROBATCHES  # whole steps before it died
        assert {trained.start for trained in again} == {done - done % EVERY}
        for resumed, wanted in zip(again, whole, strict=True):
            assert all(map(torch.equal, resumed.losses, wanted.losses[resumed.start :]))
            assert len(resumed.losses) == STEPS - resumed.start
        _equal(union([trained.state for trained in again]), union([trained.state for trained in whole]))


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def _die_saving(folder: str, victim: int, line: int) -> tuple[int, str]:
    """Save, and again with rank ``victim`` dying before a line that it runs for that; the lines, what others say."""
    rank = int(os.environ["RANK"])
    lines = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if rank == victim and lines == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    pipe = pk.Pipeline(_model([None, None]), loss_fn=F.mse_loss, microbatches=2, split=[5, 4], timeout=20.0)
    with torch.no_grad():
        for i in range(2):
            for value in pipe.state_dict().values():
                value.fill_(i)
            if i == 1:
                sys.settrace(trace)
            try:
                pipe.save(folder, i)
            except pk.TransportError as error:
                return lines, f"{type(error).__name__} {error.rank}"
            finally:
                sys.settrace(None)
    pipe.close()
    return lines, ""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("points", [3, pytest.param(60, marks=pytest.mark.full)])
def test_a_rank_dies_while_all_save(points: int, tmp_path: Path) -> None:
    """The old state or the new one, of all ranks; the others hear who died."""
    alive = values(launch(_die_saving, RANKS, str(tmp_path / "alive"), -1, 0))
    for point in range(points):
        victim = random.randrange(RANKS)
        folder, line = tmp_path / str(point), random.randint(1, alive[victim][0])
        outcomes = launch(_die_saving, RANKS, str(folder), victim, line)
        died = outcomes[victim].exitcode == -signal.SIGKILL
        assert died or outcomes[victim].error is None, outcomes[victim].error  # waits have no fixed number of lines
        survivor = outcomes[1 - victim]
        assert survivor.error is None, survivor.error
        assert survivor.value[1] in (("", f"PeerDied {victim}") if died else ("",))
        checkpoint = Checkpoint(folder)
        checkpoint.verify()
        found = {row["data"] for row in checkpoint.values}
        for key in checkpoint.entries:
            if key.startswith("model/"):
                found |= set(checkpoint.tensor(key).flatten().tolist())
        assert found in ({0}, {1}), f"a mixture of {found}"
        assert len(checkpoint.values) == RANKS
