"""A rank that dies or fails: every other rank raises at once and says who, and nothing is left behind."""

from __future__ import annotations

import os
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pipekern as pk
from tests.launch import Outcome, launch
from tests.runtime import reference
from tests.runtime.striking import Backward, strike

RANKS, MICROBATCHES, WHEN = 3, 4, 2  # the fault comes in the second step, micro-batch WHEN
WITHIN = 2.0  # seconds until every rank knows


class Fault(NamedTuple):
    """What goes wrong on rank ``victim``; ``stamp`` is the file that gets the time of it."""

    kind: str
    victim: int
    transport: str
    stamp: str

    def strike(self) -> NoReturn:
        strike(self.stamp, killed=self.kind.startswith("killed"))


class Faulty(nn.Module):
    """A layer that works for six micro-batches."""

    def __init__(self, fault: Fault | None):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.fault, self.calls = fault, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.fault is None or self.calls != MICROBATCHES + WHEN + 1:
            return self.layer(x)
        if self.fault.kind == "backward":
            return Backward.apply(self.layer(x), self.fault)
        self.fault.strike()
        raise AssertionError("not reached")


class Loss:
    """A loss that works for six micro-batches."""

    def __init__(self, fault: Fault):
        self.fault, self.calls = fault, 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        if self.fault.kind == "loss" and self.calls == MICROBATCHES + WHEN + 1:
            self.fault.strike()
        return (output - target).square().mean()


class Raised(NamedTuple):
    """What a surviving rank saw."""

    kind: str
    rank: int
    text: str
    at: float
    second: str  # what the next call says
    names: list[str]  # files in /dev/shm that this process held


def _batch() -> tuple[Tensor, Tensor]:
    return torch.ones(8, 4), torch.ones(8, 4)


def _held_names() -> list[str]:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.islink(link)]
    maps = Path("/proc/self/maps").read_text().split("\n")
    return [name for name in [*targets, *maps] if "/dev/shm/" in name and "torch_" not in name]


def _train(fault: Fault) -> Raised:
    rank = int(os.environ["RANK"])
    layers = [Faulty(fault if rank == fault.victim and fault.kind != "loss" and fault.kind != "data" else None)
              for _ in range(RANKS)]  # fmt: skip
    pipe = pk.Pipeline(
        nn.Sequential(*layers), loss_fn=Loss(fault), microbatches=MICROBATCHES, transport=fault.transport
    )
    loader = None
    if fault.kind == "killed with workers" and rank == fault.victim:
        loader = iter(
            DataLoader(
                TensorDataset(torch.arange(1000)), num_workers=1, multiprocessing_context="fork", prefetch_factor=1
            )
        )
        next(loader)  # its process holds copies of all that this one had open
    names: list[str] = []
    try:
        for step in range(3):
            if fault.kind == "data" and rank == fault.victim and step == 1:
                fault.strike()
            pipe.train_step(*_batch())
            names += _held_names()
    except pk.TransportError as error:
        at = time.monotonic()
        try:
            pipe.train_step(*_batch())
            second = "nothing"
        except pk.TransportError as again:
            second = str(again)
        return Raised(type(error).__name__, error.rank, str(error), at, second, names)
    raise AssertionError("nothing was raised")


def _strike(kind: str, victim: int, transport: str, folder: Path) -> None:
    """One fault on fresh processes, and everything that must hold afterwards."""
    fault = Fault(kind, victim, transport, str(folder / "stamp"))
    before = set(os.listdir("/dev/shm"))
    outcomes = launch(_train, RANKS, fault, timeout=40)
    left = [name for name in set(os.listdir("/dev/shm")) - before if not name.startswith(("torch_", "sem."))]
    assert left == [], f"left in /dev/shm: {left}"
    struck = float(Path(fault.stamp).read_text())
    _check_victim(kind, outcomes[victim])
    for outcome in outcomes:
        if outcome.rank != victim:
            assert outcome.error is None, f"rank {outcome.rank}: {outcome.error}\n{outcome.output}"
            _check_survivor(kind, victim, outcome.value, struck)


def _check_victim(kind: str, outcome: Outcome) -> None:
    assert outcome.error is not None
    if kind.startswith("killed"):
        assert "killed by signal 9" in outcome.error
    else:
        assert "ValueError: a fault in the user's code" in outcome.error
    if kind in ("forward", "backward", "loss"):
        assert f"rank {outcome.rank}, stage {outcome.rank}, micro-batch {WHEN}" in outcome.error


def _check_survivor(kind: str, victim: int, raised: Raised, struck: float) -> None:
    assert raised.rank == victim, raised.text
    assert f"rank {victim}" in raised.text
    assert raised.kind == ("PeerDied" if kind.startswith("killed") or kind == "data" else "Aborted"), raised.text
    if raised.kind == "Aborted":  # the root's traceback, and where it was
        instruction = "BW" if kind == "backward" else "F"
        place = (f"stage {victim}", f"micro-batch {WHEN}", f"({instruction})")
        wanted = ["Traceback", "strike", "ValueError: a fault in the user's code", *place]
        assert [part for part in wanted if part not in raised.text] == [], raised.text
    assert raised.at - struck < WITHIN, f"raised after {raised.at - struck:.1f} s"
    assert "closed" in raised.second
    assert raised.names == []


KINDS = ("killed", "killed with workers", "forward", "backward", "data", "loss")
CASES = [(kind, victim) for kind in KINDS for victim in range(RANKS) if kind != "loss" or victim == RANKS - 1]


@pytest.mark.parametrize(("kind", "victim"), CASES)
def test_fault_over_shared_memory(kind: str, victim: int, tmp_path: Path) -> None:
    _strike(kind, victim, "shm", tmp_path)


@pytest.mark.parametrize(("kind", "victim"), [("killed", 0), ("killed", 1), ("forward", 2), ("data", 1)])
def test_fault_over_torch_distributed(kind: str, victim: int, tmp_path: Path) -> None:
    _strike(kind, victim, "dist", tmp_path)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["shm", "dist"])
@pytest.mark.parametrize("kind", KINDS)
def test_fault_fifty_times(kind: str, transport: str, tmp_path: Path) -> None:
    """Without a retry; every rank in turn."""
    victims = [victim for of_kind, victim in CASES if of_kind == kind]
    for _, victim in zip(range(50), cycle(victims), strict=False):
        _strike(kind, victim, transport, tmp_path)


@pytest.mark.parametrize(
    ("kind", "stage"), [("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1), ("loss", 1)]
)
def test_in_one_process_the_pipeline_can_be_used_again(kind: str, stage: int, tmp_path: Path, seed: int) -> None:
    """The exception says where it was; after zero_grad the gradients are right."""
    fault = Fault(kind, stage, "local", str(tmp_path / "stamp"))
    layers = [Faulty(fault if index == stage and kind != "loss" else None) for index in range(2)]
    loss_fn = Loss(fault)
    pipe = pk.Pipeline(nn.Sequential(*layers).double(), loss_fn=loss_fn, microbatches=MICROBATCHES, ranks=2)
    optimizer = pipe.optimizer(torch.optim.SGD, lr=0.0)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    with pipe:
        pipe.train_step(x, y)
        with pytest.raises(ValueError, match="a fault in the user's code") as raised:
            pipe.train_step(x, y)
        if sys.version_info >= (3, 11):  # before, exceptions take no notes
            (note,) = raised.value.__notes__
            assert f"rank {stage}, stage {stage}, micro-batch {WHEN}" in note
        optimizer.zero_grad()
        loss = pipe.train_step(x, y)
        got = {name: p.grad for name, p in pipe.named_parameters()}
    model = nn.Sequential(*(Faulty(None) for _ in range(2))).double()
    model.load_state_dict(pipe.state_dict())
    assert abs(loss - reference.step(model, lambda a, b: (a - b).square().mean(), x, y)) <= 1e-12
    assert reference.distance(got, reference.gradients(model)) <= 1e-12
