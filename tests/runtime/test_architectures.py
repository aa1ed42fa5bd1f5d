"""Well-known architectures train as the unsplit model does, micro-batch by micro-batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pipekern as pk
from tests.runtime import reference
from tests.runtime.architectures import ARCHITECTURES
from tests.runtime.models import Batch
from tests.runtime.step import run

STEPS, MICROBATCHES, SAMPLES = 20, 4, 8


def _build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = ARCHITECTURES[name].build().double()
    assert isinstance(model, nn.Module)
    return model


def _batches(name: str, seed: int) -> list[Batch]:
    torch.manual_seed(seed + 1)
    return [ARCHITECTURES[name].batch(SAMPLES) for _ in range(4)]


def _losses(ranks: int, name: str, seed: int, schedule: str) -> list[float]:
    batches, losses = _batches(name, seed), []
    loss_fn = ARCHITECTURES[name].loss_fn
    with pk.Pipeline(
        _build(name, seed), loss_fn=loss_fn, microbatches=MICROBATCHES, ranks=ranks, schedule=schedule
    ) as pipe:
        optimizer = pipe.optimizer(torch.optim.AdamW, lr=3e-3)
        for number in range(STEPS):
            losses.append(float(pipe.train_step(*batches[number % len(batches)])))
            pipe.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def _wanted(name: str, seed: int) -> list[float]:
    kind, model, losses = ARCHITECTURES[name], _build(name, seed), []
    loss_fn, forward = _scalar(kind.loss_fn), _Spread(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = _batches(name, seed)
    for number in range(STEPS):
        parts = MICROBATCHES if kind.coupled else 1
        losses.append(float(reference.step(forward, loss_fn, *batches[number % len(batches)], parts)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


class _Spread(nn.Module):
    """A model's call with its inputs spread, where its forward takes several."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(*x) if isinstance(x, tuple) and not isinstance(self.model, nn.Sequential) else self.model(x)


def _scalar(loss_fn: Any) -> Any:
    def scalar(output: Any, target: Any) -> Any:
        loss = loss_fn(output, target)
        return loss[0] / loss[1] if isinstance(loss, tuple) else loss

    return scalar


@pytest.mark.parametrize(
    ("processes", "ranks", "schedule"),
    [
        (False, 3, "zb-h1"),
        (True, 2, "zb-v"),
        pytest.param(True, 3, "1f1b", marks=pytest.mark.full),
        pytest.param(False, 2, "interleaved-1f1b", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_falls_as_the_unsplit_models_does(
    name: str, processes: bool, ranks: int, schedule: str, seed: int
) -> None:
    for losses in run(processes, _losses, ranks, name, seed, schedule):
        wanted = _wanted(name, seed)
        assert sum(wanted[-4:]) < sum(wanted[:4])  # the same four batches
        assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) <= 1e-6, (losses, wanted)
