"""Checkpoints of a pipeline on a GPU, loaded there and on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def _pipe(ranks: int, device: str) -> pk.Pipeline:
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Linear(8, 8))
    return pk.Pipeline(
        model, loss_fn=F.mse_loss, microbatches=2, ranks=ranks, devices=[device], transport="local", seed=3
    )


def _steps(pipe: pk.Pipeline, optimizer: torch.optim.Optimizer, count: int) -> list[Tensor]:
    losses = []
    for _ in range(count):
        x = torch.randn(8, 8, device="cuda")
        losses.append(pipe.train_step(x, x))
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_steps_after_loading_are_those_without(options: dict[str, Any], tmp_path: Path) -> None:
    """The batches come from the GPU's own generator; the count of steps is where torch has it."""
    with _pipe(2, "cuda:0") as pipe, _pipe(3, "cuda:0") as other:
        optimizer, fresh = (p.optimizer(torch.optim.AdamW, lr=0.01, **options) for p in (pipe, other))
        _steps(pipe, optimizer, 2)
        pipe.save(tmp_path)
        want = _steps(pipe, optimizer, 2)
        other.load(tmp_path)
        assert all(map(torch.equal, _steps(other, fresh, 2), want))
        for p, q in zip(pipe.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
            for key, value in optimizer.state[p].items():
                assert fresh.state[q][key].device == value.device
                assert torch.equal(fresh.state[q][key], value)


def test_the_cpu_takes_over(tmp_path: Path) -> None:
    with _pipe(2, "cuda:0") as pipe, _pipe(2, "cpu") as other:
        optimizer, fresh = (p.optimizer(torch.optim.AdamW, lr=0.01) for p in (pipe, other))
        _steps(pipe, optimizer, 2)
        pipe.save(tmp_path)
        other.load(tmp_path)
        for p, q in zip(pipe.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.cpu(), q)
            assert all(torch.equal(value.cpu(), fresh.state[q][key]) for key, value in optimizer.state[p].items())
        x = torch.randn(8, 8)
        assert torch.isfinite(other.train_step(x, x))
        fresh.step()
