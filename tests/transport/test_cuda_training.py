"""Pipelines over the CUDA transport, on the stand-in driver; tests/runtime/test_parity.py has more kinds of models."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from tests.launch import launch, values
from tests.transport import fake_cuda

pytest.importorskip("pipekern._C")


def train(transport: str, ranks: int | None, schedule: str, codec: str = "none") -> dict[str, Tensor]:
    """Three steps; this process's parameters afterwards."""
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.Tanh())))
    pipe = pk.Pipeline(
        net,
        loss_fn=nn.MSELoss(),
        microbatches=6,
        schedule=schedule,
        transport=transport,
        ranks=ranks,
        devices=["cpu"],
        codec=codec,
    )
    assert pipe._parts.transport.name == ("cuda" if transport == "cuda" else "local")
    optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(3):
        pipe.train_step(torch.randn(48, 32), torch.randn(48, 32))
        optimizer.step()
        optimizer.zero_grad()
    pipe._parts.transport.close()
    return {name: value.detach().clone() for name, value in pipe.named_parameters()}


def trained_with(codec: str) -> float:
    """The largest difference that the codec makes, relative to the parameter's largest value."""
    fake_cuda.load("fake-cuda")
    del os.environ["RANK"]
    reference, cast = train("local", 2, "1f1b"), train("cuda", 2, "1f1b", codec)
    return max(float((cast[n] - reference[n]).abs().max() / reference[n].abs().max()) for n in reference)


@pytest.mark.parametrize(("codec", "most"), [("bf16", 0.005), ("fp8", 0.05)])
def test_a_pipeline_trains_with_a_codec(codec: str, most: float) -> None:
    fake_cuda.library()
    (difference,) = values(launch(trained_with, 1, codec))
    assert 0 < difference < most


def trained_here(schedule: str, ranks: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    fake_cuda.load("fake-cuda")
    launched = "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
    if not launched:
        del os.environ["RANK"]
    over_cuda = train("cuda", None if launched else ranks, schedule)
    return over_cuda, train("local", ranks, schedule)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("together", [True, False])
def test_a_pipeline_trains_to_the_same_bits(schedule: str, ranks: int, together: bool) -> None:
    """In one process, and a rank a process. A stage in the middle gives its slots back by the end of a step."""
    fake_cuda.library()
    names: set[str] = set()
    for over_cuda, reference in values(launch(trained_here, 1 if together else ranks, schedule, ranks)):
        names |= over_cuda.keys()
        for name, value in over_cuda.items():
            assert torch.equal(value, reference[name]), name
    assert len(names) == 8
