"""SwiGLU beside torch's silu(gate) · up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipekern import ConfigError
from pipekern.kernels.swiglu import swiglu

from .accuracy import DTYPES, VIEWS, compare, views


def torch_swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return F.silu(gate) * up


def test_golden(device: str) -> None:
    """silu(0) is 0; silu(v) is nearly v where v is large, nearly 0 where it is very negative."""
    gate, up = torch.tensor([0.0, 40.0, -200.0], device=device), torch.tensor([3.0, 0.5, 7.0], device=device)
    assert swiglu(gate, up).tolist() == [0.0, 20.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 40, 1500])
def test_as_torch(dtype: torch.dtype, columns: int, device: str) -> None:
    """Apart, and as the halves of one tensor."""
    gate, up = (3 * torch.randn(2, 5, columns, device=device).to(dtype) for _ in range(2))
    compare(swiglu, torch_swiglu, gate, up)
    compare(swiglu, torch_swiglu, torch.cat((gate, up), -1))


@pytest.mark.parametrize("name", VIEWS)
def test_any_strides(name: str, device: str) -> None:
    gate, up, dy = (views(3, 4, 48, dtype=torch.bfloat16, device=device)[name] for _ in range(3))
    compare(swiglu, torch_swiglu, gate, up, grads=(dy,))
    compare(swiglu, torch_swiglu, gate, grads=(dy[..., :24],))


def test_more_dimensions_than_strides_fit(device: str) -> None:
    gate = torch.randn(2, 3, 2, 3, 2, 16, device=device).permute(4, 2, 0, 3, 1, 5)
    compare(swiglu, torch_swiglu, gate, torch.randn(2, 2, 2, 3, 3, 16, device=device))


def test_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=r"gate is \(2, 3\) and up \(3,\)"):
        swiglu(torch.zeros(2, 3, device=device), torch.zeros(3, device=device))
    with pytest.raises(ConfigError, match="make it even"):
        swiglu(torch.zeros(2, 3, device=device))
