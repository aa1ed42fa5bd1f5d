"""RMSNorm beside torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipekern import ConfigError
from pipekern.kernels.rms_norm import rms_norm

from .accuracy import DTYPES, VIEWS, compare, views

EPS = 1e-5


Sums = Tensor | tuple[Tensor, Tensor]


def torch_norm(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None) -> Sums:
    h = x if residual is None else x + residual
    y = F.rms_norm(h, h.shape[-1:], weight, EPS)
    return y if residual is None else (y, h)


def own_norm(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None) -> Sums:
    return rms_norm(x, weight, EPS) if residual is None else rms_norm(x, weight, EPS, residual)


def test_golden(device: str) -> None:
    """(1, 7) has the mean square 25: divided by 5, times (1, 2)."""
    x, weight = torch.tensor([[1.0, 7.0]], device=device), torch.tensor([1.0, 2.0], device=device)
    assert rms_norm(x, weight, 0.0).tolist()[0] == pytest.approx([0.2, 2.8], rel=1e-6)
    y, h = rms_norm(x, weight, 0.0, torch.tensor([[6.0, -6.0]], device=device))
    assert h.tolist() == [[7.0, 1.0]]
    assert y.tolist()[0] == pytest.approx([1.4, 0.4], rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [2, 33, 40, 256])
@pytest.mark.parametrize("kind", ["plain", "weight", "residual"])
def test_as_torch(dtype: torch.dtype, columns: int, kind: str, device: str) -> None:
    x, residual = (torch.randn(5, 7, columns, device=device).to(dtype) for _ in range(2))
    weight = None if kind == "plain" else torch.randn(columns, device=device).to(dtype)
    compare(own_norm, torch_norm, x, weight, residual if kind == "residual" else None)


def test_rows_of_one(device: str) -> None:
    """x / |x|, whose slope is nought: what comes of the gradient is a rounding of its terms."""
    x, weight = torch.randn(9, 1, device=device, requires_grad=True), torch.tensor([3.0], device=device)
    y = rms_norm(x, weight, 0.0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(y, 3 * x.sign(), rtol=1e-6)
    assert (dx.abs() <= 1e-6 * (3 / x).abs()).all()


@pytest.mark.parametrize("columns", [9000, 20000])
def test_wide_rows(columns: int, device: str) -> None:
    """Rows that are cut into blocks in the backward pass, and in both."""
    x, residual = (torch.randn(3, columns, device=device) for _ in range(2))
    weight = torch.randn(columns, device=device)
    compare(own_norm, torch_norm, x, weight)
    compare(own_norm, torch_norm, x, weight, residual)


@pytest.mark.parametrize("name", VIEWS)
def test_any_strides(name: str, device: str) -> None:
    x, residual, dy, dh = (views(3, 4, 48, dtype=torch.bfloat16, device=device)[name] for _ in range(4))
    weight = torch.randn(96, device=device).bfloat16()[::2]
    compare(own_norm, torch_norm, x, weight, residual, grads=(dy, dh))


def test_more_dimensions_than_strides_fit(device: str) -> None:
    x = torch.randn(2, 3, 2, 3, 2, 16, device=device).permute(4, 2, 0, 3, 1, 5)
    weight = torch.randn(16, device=device)
    compare(own_norm, torch_norm, x, weight)


def test_the_sum_has_the_wider_dtype(device: str) -> None:
    x, residual = torch.randn(4, 32, device=device).bfloat16(), torch.randn(4, 32, device=device)
    y, h = rms_norm(x, None, EPS, residual)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(h, x + residual)


def test_only_the_sum_is_used(device: str) -> None:
    x, residual = (torch.randn(4, 8, device=device, requires_grad=True) for _ in range(2))
    rms_norm(x, None, EPS, residual)[1].sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_refused(device: str) -> None:
    """What a kernel would read beyond its end."""
    x = torch.zeros(4, 8, device=device)
    with pytest.raises(ConfigError, match=r"weight is \(4,\); for x \(4, 8\) it must be \(8,\)"):
        rms_norm(x, torch.zeros(4, device=device), EPS)
    with pytest.raises(ConfigError, match=r"residual is \(8,\)"):
        rms_norm(x, None, EPS, torch.zeros(8, device=device))
