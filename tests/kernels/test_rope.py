"""Rotary position embedding beside a plain one in torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipekern import ConfigError
from pipekern.kernels.rope import rope, rope_

from .accuracy import DTYPES, compare

NEIGHBOURS = pytest.mark.parametrize("neighbours", [False, True])


def angles(*shape: int, device: str) -> tuple[Tensor, Tensor]:
    turn = 7 * torch.rand(shape, device=device)
    return turn.cos(), turn.sin()


def as_complex(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> Tensor:
    """Every pair as a complex number, times that of its angle."""
    half = cos.shape[-1]
    pairs = x[..., : 2 * half].unflatten(-1, (half, 2) if neighbours else (2, half))
    real, imaginary = pairs.unbind(-1 if neighbours else -2)
    cos, sin = (t.to(x.dtype).unsqueeze(-2) for t in (cos, sin))
    turned = (real * cos - imaginary * sin, imaginary * cos + real * sin)
    return torch.cat((torch.stack(turned, -1 if neighbours else -2).flatten(-2), x[..., 2 * half :]), -1)


def test_golden(device: str) -> None:
    """A quarter turn of (1, 2): (−2, 1); the second position is not turned, nor is what is left of the head."""
    turn = torch.tensor([[math.pi / 2], [0.0]], device=device)
    q = torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]], device=device).view(1, 2, 1, 3)
    for neighbours in (False, True):
        for turned in rope(q, q, turn.cos(), turn.sin(), neighbours):
            assert turned.flatten().tolist() == pytest.approx([-2, 1, 5, 1, 2, 5], abs=1e-6)


@NEIGHBOURS
@pytest.mark.parametrize(
    ("dtype", "d", "r"), [*zip((*DTYPES, torch.float32), (2, 16, 24, 40), (2, 16, 12, 20), strict=True)]
)
def test_as_torch(dtype: torch.dtype, d: int, r: int, neighbours: bool, device: str) -> None:
    q, k = (torch.randn(2, 3, heads, d, device=device).to(dtype) for heads in (6, 2))
    for shape in ((3, r // 2), (2, 3, r // 2)):
        cos, sin = angles(*shape, device=device)
        compare(
            lambda q, k, cos=cos, sin=sin: rope(q, k, cos, sin, neighbours),
            lambda q, k, cos=cos, sin=sin: [as_complex(x, cos, sin, neighbours) for x in (q, k)],
            q,
            k,
        )


def packed(device: str) -> tuple[Tensor, Tensor]:
    """q and k as they lie in the output of one projection, heads behind positions."""
    whole = torch.randn(2, 3, 4 + 2 + 2, 16, device=device)
    return whole[:, :, :4], whole[:, :, 4:6]


@NEIGHBOURS
def test_any_strides(neighbours: bool, device: str) -> None:
    cos, sin = (t[:, ::2] for t in angles(3, 16, device=device))
    for q, k in (packed(device), [t.transpose(1, 2).contiguous().transpose(1, 2) for t in packed(device)]):
        compare(
            lambda q, k: rope(q, k, cos, sin, neighbours),
            lambda q, k: [as_complex(x, cos, sin, neighbours) for x in (q, k)],
            q,
            k,
        )


@NEIGHBOURS
@pytest.mark.parametrize("r", [16, 8])
def test_in_place(r: int, neighbours: bool, device: str) -> None:
    """The same bits as :func:`rope`, and nothing else of the memory touched."""
    q, k = packed(device)
    cos, sin = angles(3, r // 2, device=device)
    want = rope(q, k, cos, sin, neighbours)
    base = q._base
    assert base is not None
    v = base[:, :, 6:].clone()
    rope_(q, k, cos, sin, neighbours)
    assert torch.equal(q, want[0])
    assert torch.equal(k, want[1])
    assert torch.equal(base[:, :, 6:], v)


def test_refused(device: str) -> None:
    q = torch.zeros(1, 3, 2, 8, device=device)
    cos = torch.zeros(3, 8, device=device)
    with pytest.raises(ConfigError, match="pass the first"):
        rope(q, q, cos, cos)
    with pytest.raises(ConfigError, match="both must be"):
        rope(q, q[0], cos[:, :4], cos[:, :4])
    with pytest.raises(ConfigError, match="use rope"):
        rope_(q.requires_grad_(), q, cos[:, :4], cos[:, :4])
