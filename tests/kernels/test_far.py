"""Rows more than 2³¹ elements apart: offsets that 32 bits do not hold, in few elements of a large, empty memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pipekern.kernels.cross_entropy import cross_entropy
from pipekern.kernels.gelu import gelu
from pipekern.kernels.layer_norm import layer_norm
from pipekern.kernels.pack import FORMATS, pack, unpack
from pipekern.kernels.rms_norm import rms_norm
from pipekern.kernels.rope import rope, rope_
from pipekern.kernels.swiglu import swiglu

from .test_ops import equal

STRIDE = 2**31 + 8


def far(near: Tensor, along: int) -> Tensor:
    """The values of ``near``, STRIDE elements apart in one of two dimensions; what is between them nobody touches."""
    elements = STRIDE + max(near.shape)
    if near.is_cuda:
        memory = torch.empty(0, dtype=near.dtype, device=near.device)
        memory.untyped_storage().resize_(2 * elements)
    else:
        memory = torch.frombuffer(mmap.mmap(-1, 2 * elements), dtype=near.dtype)
    return memory.as_strided(near.shape, (STRIDE, 1) if along == 0 else (1, STRIDE)).copy_(near)


def turned(x: Tensor) -> tuple[Tensor, Tensor]:
    heads, angle = x.view(len(x), 1, 1, -1), torch.ones(1, x.shape[1] // 2, device=x.device)
    return rope(heads, heads, angle.cos(), angle.sin())


OPS: dict[str, Callable[[Tensor], Any]] = {
    "rms_norm": lambda x: rms_norm(x, None, 1e-5, x),
    "layer_norm": lambda x: layer_norm(x, None, None, 1e-5, x),
    "swiglu": lambda x: swiglu(x, x),
    "swiglu packed": swiglu,
    "gelu": gelu,
    "cross_entropy": lambda x: cross_entropy(x, torch.arange(len(x), device=x.device) % 2, reduction="none"),
    "rope": turned,
}


def run(op: Callable[[Tensor], Any], x: Tensor, move: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Outputs, and the gradient for gradients that ``move`` has moved."""
    x = x.detach().requires_grad_()
    outputs = tree_leaves(op(x))
    grads = [torch.full_like(y, 0.75) for y in outputs]
    return [
        *(y.detach() for y in outputs),
        *torch.autograd.grad(outputs, x, [move(g) if g.dim() == 2 else g for g in grads]),
    ]


@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("name", OPS)
def test_as_near_by(name: str, along: int, device: str) -> None:
    """The same bits, forward and backward, of rows and of columns that are far apart."""
    near = torch.randn((2, 16) if along == 0 else (16, 2), device=device).bfloat16()
    want = run(OPS[name], near, lambda grad: grad)
    got = run(OPS[name], far(near, along), lambda grad: far(grad, along) if grad.shape == near.shape else grad)
    assert equal(got, want)


@pytest.mark.parametrize("dtype", FORMATS)
def test_packed(dtype: torch.dtype, device: str) -> None:
    near = torch.randn(2, 200, device=device).bfloat16()
    slot = pack(near, dtype)
    assert torch.equal(pack(far(near, 0), dtype), slot)
    assert torch.equal(unpack(slot, far(torch.zeros_like(near), 0), dtype), unpack(slot, torch.zeros_like(near), dtype))


def test_written_in_place(device: str) -> None:
    near = torch.randn(2, 16, device=device).bfloat16()
    moved, angle = far(near, 0), torch.ones(1, 8, device=device)
    for x in (near, moved):
        rope_(x.view(2, 1, 1, 16), x.view(2, 1, 1, 16)[:, :, :0], angle.cos(), angle.sin())
    assert torch.equal(near, moved)
