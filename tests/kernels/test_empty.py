"""Tensors of no element, in the rows or in their number: shapes are right, and gradients of weights are zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipekern.kernels.cross_entropy import cross_entropy
from pipekern.kernels.gelu import gelu
from pipekern.kernels.layer_norm import layer_norm
from pipekern.kernels.rms_norm import rms_norm
from pipekern.kernels.rope import rope
from pipekern.kernels.swiglu import swiglu

OPS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, w, b: rms_norm(x, w, 1e-6) + 0 * b,
    "layer_norm": lambda x, w, b: layer_norm(x, w, b, 1e-6),
    "swiglu": lambda x, w, b: swiglu(x, x) * w + b,
    "gelu": lambda x, w, b: gelu(x, b) * w,
}


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", OPS)
def test_no_element(name: str, shape: tuple[int, ...], device: str) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    weight, bias = (torch.ones(shape[-1], device=device, requires_grad=True) for _ in range(2))
    y = OPS[name](x, weight, bias)
    assert y.shape == shape
    grads = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert grads[0].shape == shape
    assert not any(grad.any() for grad in grads)


def test_no_token(device: str) -> None:
    logits = torch.zeros(0, 7, device=device, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long, device=device)
    for reduction in ("mean", "sum"):
        loss = cross_entropy(logits, target, reduction=reduction)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, logits)[0].shape == (0, 7)
    assert cross_entropy(logits, target, reduction="none").shape == (0,)


def test_no_position_and_no_head(device: str) -> None:
    angles = torch.zeros(0, 4, device=device)
    for heads in (0, 2):
        q = torch.zeros(2, 0, heads, 8, device=device)
        assert rope(q, q, angles, angles)[0].shape == q.shape
    q, angles = torch.zeros(2, 3, 0, 8, device=device), torch.zeros(3, 4, device=device)
    assert rope(q, q, angles, angles)[1].shape == q.shape
