"""Parameters of random shapes, and gradients as a backward leaves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SHAPES = ((3,), (40, 50), (), (2500,), (2, 3, 4))


def parameters(device: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in SHAPES]


def draw(own: list[nn.Parameter], size: float = 1.0) -> list[Tensor]:
    return [torch.randn(p.shape, device=p.device) * size for p in own]


def give(own: list[nn.Parameter], grads: list[Tensor | None] | list[Tensor]) -> None:
    """As a backward does: into the memory that is there."""
    for p, grad in zip(own, grads, strict=True):
        if grad is None:
            p.grad = None
        elif p.grad is None:
            p.grad = grad.clone().to(p.dtype)
        else:
            p.grad.copy_(grad)


def equal(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-6, atol=1e-6)


def groups(own: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": own[:2], "weight_decay": 0.3, "lr": 3e-3}, {"params": own[2:], "betas": (0.8, 0.95)}]
