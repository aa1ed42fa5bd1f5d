"""LayerNorm beside torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipekern import ConfigError
from pipekern.kernels.layer_norm import layer_norm

from .accuracy import DTYPES, VIEWS, compare, views

EPS = 1e-5


Sums = Tensor | tuple[Tensor, Tensor]


def torch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None) -> Sums:
    h = x if residual is None else x + residual
    y = F.layer_norm(h, h.shape[-1:], weight, bias, EPS)
    return y if residual is None else (y, h)


def own_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None) -> Sums:
    if residual is None:
        return layer_norm(x, weight, bias, EPS)
    return layer_norm(x, weight, bias, EPS, residual)


def test_golden(device: str) -> None:
    """(1, 7) has mean 4 and deviation 3: (−1, 1), times (1, 2), plus (0, 5)."""
    x, weight, bias = (torch.tensor(v, device=device) for v in ([[1.0, 7.0]], [1.0, 2.0], [0.0, 5.0]))
    assert layer_norm(x, weight, bias, 0.0).tolist()[0] == pytest.approx([-1.0, 7.0], rel=1e-6)
    y, h = layer_norm(x, weight, bias, 0.0, torch.tensor([[6.0, -6.0]], device=device))
    assert h.tolist() == [[7.0, 1.0]]
    assert y.tolist()[0] == pytest.approx([1.0, 3.0], rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [2, 33, 40, 256])
@pytest.mark.parametrize("kind", ["plain", "weight", "bias", "residual"])
def test_as_torch(dtype: torch.dtype, columns: int, kind: str, device: str) -> None:
    x, residual = (torch.randn(5, 7, columns, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(columns, device=device).to(dtype) if kind in ("weight", "residual") else None
    bias = torch.randn(columns, device=device).to(dtype) if kind in ("bias", "residual") else None
    compare(own_norm, torch_norm, x, weight, bias, residual if kind == "residual" else None)


def test_rows_of_one(device: str) -> None:
    """Nothing is left but the bias."""
    x, bias = torch.randn(9, 1, device=device, requires_grad=True), torch.tensor([3.0], device=device)
    y = layer_norm(x, torch.ones_like(bias), bias, EPS)
    assert y.flatten().tolist() == [3.0] * 9
    assert not torch.autograd.grad(y.sum(), x)[0].any()


@pytest.mark.parametrize("columns", [9000, 20000])
def test_wide_rows(columns: int, device: str) -> None:
    """Rows that are cut into blocks in the backward pass, and in both."""
    x, residual = (torch.randn(3, columns, device=device) for _ in range(2))
    weight, bias = (torch.randn(columns, device=device) for _ in range(2))
    compare(own_norm, torch_norm, x, weight, bias)
    compare(own_norm, torch_norm, x, weight, bias, residual)


@pytest.mark.parametrize("name", VIEWS)
def test_any_strides(name: str, device: str) -> None:
    x, residual, dy, dh = (views(3, 4, 48, dtype=torch.bfloat16, device=device)[name] for _ in range(4))
    weight, bias = (torch.randn(96, device=device).bfloat16()[::2] for _ in range(2))
    compare(own_norm, torch_norm, x, weight, bias, residual, grads=(dy, dh))


def test_more_dimensions_than_strides_fit(device: str) -> None:
    x = torch.randn(2, 3, 2, 3, 2, 16, device=device).permute(4, 2, 0, 3, 1, 5)
    weight = torch.randn(16, device=device)
    compare(own_norm, torch_norm, x, weight, None)


def test_the_sum_has_the_wider_dtype(device: str) -> None:
    x, residual = torch.randn(4, 32, device=device).bfloat16(), torch.randn(4, 32, device=device)
    y, h = layer_norm(x, None, None, EPS, residual)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(h, x + residual)


def test_only_the_sum_is_used(device: str) -> None:
    x, residual = (torch.randn(4, 8, device=device, requires_grad=True) for _ in range(2))
    layer_norm(x, None, None, EPS, residual)[1].sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_large_means_do_not_cost_digits(device: str) -> None:
    """The variance is made of centred values: a mean square minus a squared mean would have none left."""
    x = 1000 + torch.randn(4, 512, device=device)
    compare(own_norm, torch_norm, x, torch.randn(512, device=device), torch.randn(512, device=device))


def test_refused(device: str) -> None:
    """What a kernel would read beyond its end."""
    x = torch.zeros(4, 8, device=device)
    with pytest.raises(ConfigError, match=r"weight is \(4,\); for x \(4, 8\) it must be \(8,\)"):
        layer_norm(x, torch.zeros(4, device=device), None, EPS)
    with pytest.raises(ConfigError, match=r"residual is \(8,\)"):
        layer_norm(x, None, None, EPS, torch.zeros(8, device=device))
