"""Parameters that a step has not used, among replicas: an optimizer leaves them as they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.launch import launch, values

STEPS = [(-1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, 1.0)]  # by replica: above 0 the scale is used


class Sometimes(nn.Module):
    """Uses its scale if the first number of a micro-batch is above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.never = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if x[0, 0] > 0 else x


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Sometimes(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()


def _batch(step: int, replica: int) -> Tensor:
    return torch.arange(1.0, 17.0, dtype=torch.float64).view(4, 4) * STEPS[step][replica] / (1 + replica + step)


def _optimizer(make: Any) -> torch.optim.Optimizer:
    return make(torch.optim.AdamW, lr=0.1, weight_decay=0.5)


def _train(zero: int, on_nonfinite: str, folder: str) -> tuple[list[bool], dict[str, Tensor]]:
    """Whether the scale has a gradient after each step, where it is here; the parameters at the end."""
    replica = int(os.environ["RANK"]) // 2
    options: dict[str, Any] = {"zero": zero, "on_nonfinite": on_nonfinite, "timeout": 20.0}
    with pk.Pipeline(_model(), loss_fn=F.mse_loss, microbatches=2, mesh={"dp": 2, "pp": 2}, **options) as pipe:
        optimizer = _optimizer(pipe.optimizer)
        has = []
        for step in range(len(STEPS)):
            x = _batch(step, replica)
            pipe.train_step(x, x)
            has += [p.grad is not None for name, p in pipe.named_parameters() if name == "0.scale"]
            assert all(p.grad is None for name, p in pipe.named_parameters() if name == "0.never")
            optimizer.step()
            optimizer.zero_grad()
        pipe.save(folder)  # a state for some of a bucket's parameters alone
        pipe.load(folder)
        x = _batch(3, replica)
        pipe.train_step(x, x)
        optimizer.step()
        return has, {name: value.clone() for name, value in pipe.state_dict().items()}


def _unsplit() -> dict[str, Tensor]:
    model = _model()
    optimizer = _optimizer(lambda cls, **options: cls(model.parameters(), **options))
    for step in [*range(len(STEPS)), 3]:
        optimizer.zero_grad()
        for replica in range(2):
            x = _batch(step, replica)
            (F.mse_loss(model(x), x) / 2).backward()
        optimizer.step()
    return dict(model.state_dict())


@pytest.mark.parametrize(("zero", "policy"), [(0, "raise"), (1, "skip"), (2, "raise"), (3, "raise")])
def test_golden(zero: int, policy: str, tmp_path: Path) -> None:
    """Used by none of the replicas, by one, by none, by both; one more of it is never used."""
    want = _unsplit()
    for has, state in values(launch(_train, 4, zero, policy, str(tmp_path))):
        assert has in ([False, True, False, True], []), "the replicas do not agree"
        for name, value in state.items():
            assert (value - want[name]).abs().max() <= 1e-12, name
