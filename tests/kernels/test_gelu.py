"""GELU with bias beside torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipekern import ConfigError
from pipekern.kernels.gelu import gelu

from .accuracy import DTYPES, VIEWS, compare, views

KINDS = pytest.mark.parametrize("kind", ["none", "tanh"])


def test_golden(device: str) -> None:
    """gelu(1) = Φ(1) = 0.841345; the bias comes first."""
    assert gelu(torch.tensor([[1.0, 0.0, -1.0]], device=device)).tolist()[0] == pytest.approx(
        [0.841345, 0.0, -0.158655], abs=1e-6
    )
    x, bias = torch.zeros(1, 2, device=device), torch.tensor([1.0, -1.0], device=device)
    assert gelu(x, bias, "tanh").tolist()[0] == pytest.approx([0.841192, -0.158808], abs=1e-6)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 40, 1500])
def test_as_torch(dtype: torch.dtype, columns: int, kind: str, device: str) -> None:
    def torch_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.gelu(x if bias is None else x + bias, approximate=kind)

    def own(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return gelu(x, bias, kind)

    x, bias = (torch.randn(*shape, device=device).to(dtype) for shape in ((2, 9, columns), (columns,)))
    compare(own, torch_gelu, x)
    compare(own, torch_gelu, x, bias)


@pytest.mark.parametrize("name", VIEWS)
def test_any_strides(name: str, device: str) -> None:
    x, dy = (views(3, 4, 48, dtype=torch.bfloat16, device=device)[name] for _ in range(2))
    bias = torch.randn(96, device=device).bfloat16()[::2]
    compare(gelu, lambda x, bias: F.gelu(x + bias), x, bias, grads=(dy,))


def test_far_from_zero(device: str) -> None:
    """The tanh form must not overflow, nor its slope be NaN."""
    x = torch.tensor([[-1e4, -50.0, 50.0, 1e4]], device=device)
    compare(lambda x: gelu(x, None, "tanh"), lambda x: F.gelu(x, approximate="tanh"), x)
    compare(gelu, F.gelu, x)


def test_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="approximate='erf'"):
        gelu(torch.zeros(2, device=device), None, "erf")
    with pytest.raises(ConfigError, match=r"bias is \(3,\)"):
        gelu(torch.zeros(2, device=device), torch.zeros(3, device=device))
