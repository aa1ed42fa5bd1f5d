"""SwiGLU: y = silu(gate) · up, gate and up apart or as the halves of one tensor.

Bytes an output in bfloat16, forward and backward: 6 and 10.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipekern.errors import ConfigError

from . import reference
from .language import check_floats, jit, launch, narrow, tl
from .layout import even, lead, pieces, place, slabs, step
from .library import define


@jit
def _forward(
    gate, g0, g1, g2, g3, up, u0, u1, u2, u3, y, T, B, C, F, STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    F = even(F, STEP)
    row, col, mask = place(T, F, ROWS, BLOCK)
    g = tl.load(gate + lead(row, B, C, g0, g1, g2, STEP) + col * g3, mask, 0).to(tl.float32)
    u = tl.load(up + lead(row, B, C, u0, u1, u2, STEP) + col * u3, mask, 0).to(tl.float32)
    tl.store(y + row * F + col, narrow(g * tl.sigmoid(g) * u, y.dtype.element_ty), mask)


@jit
def _backward(
    dy, d0, d1, d2, d3, gate, g0, g1, g2, g3, up, u0, u1, u2, u3, dx, T, B, C, F,
    STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    F = even(F, STEP)
    row, col, mask = place(T, F, ROWS, BLOCK)
    d = tl.load(dy + lead(row, B, C, d0, d1, d2, STEP) + col * d3, mask, 0).to(tl.float32)
    g = tl.load(gate + lead(row, B, C, g0, g1, g2, STEP) + col * g3, mask, 0).to(tl.float32)
    u = tl.load(up + lead(row, B, C, u0, u1, u2, STEP) + col * u3, mask, 0).to(tl.float32)
    s = tl.sigmoid(g)
    dx += row * 2 * F + col
    tl.store(dx, narrow(d * u * s * (1 + g * (1 - s)), dx.dtype.element_ty), mask)
    tl.store(dx + F, narrow(d * g * s, dx.dtype.element_ty), mask)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return (gate, up) if up is not None else (gate[..., : gate.shape[-1] // 2], gate[..., gate.shape[-1] // 2 :])


def _kernel(gate: Tensor, up: Tensor | None) -> Tensor:
    check_floats(gate=gate, up=up)
    y = _fake(gate, up)
    rows, block, warps, _ = pieces(y.shape[-1])
    for slab in slabs(*_halves(gate, up), y):
        of_gate, of_up, (of_y, *_) = slab.tensors
        launch(
            _forward, -(-slab.rows // rows) * -(-y.shape[-1] // block), warps, *of_gate, *of_up, of_y,
            slab.rows, slab.b, slab.c, y.shape[-1], STEP=step(y.shape[-1], of_gate, of_up), ROWS=rows, BLOCK=block,
        )  # fmt: skip
    return y


def _fake(gate: Tensor, up: Tensor | None) -> Tensor:
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def _backward_kernel(dy: Tensor, gate: Tensor, up: Tensor | None) -> Tensor:
    check_floats(dy=dy)
    dx = _backward_fake(dy, gate, up)
    rows, block, warps, _ = pieces(dy.shape[-1])
    for slab in slabs(dy, *_halves(gate, up), dx):
        of_dy, of_gate, of_up, (of_dx, *_) = slab.tensors
        launch(
            _backward, -(-slab.rows // rows) * -(-dy.shape[-1] // block), warps, *of_dy, *of_gate, *of_up, of_dx,
            slab.rows, slab.b, slab.c, dy.shape[-1], STEP=step(dy.shape[-1], of_dy, of_gate, of_up),
            ROWS=rows, BLOCK=block,
        )  # fmt: skip
    return dx


def _backward_fake(dy: Tensor, gate: Tensor, up: Tensor | None) -> Tensor:
    return gate.new_empty((*dy.shape[:-1], 2 * dy.shape[-1]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    gate, up = ctx.saved_tensors
    dx = torch.ops.pipekern.swiglu_backward(dy, gate, up)
    return (dx, None) if up is None else dx.chunk(2, -1)


define(
    "swiglu(Tensor gate, Tensor? up) -> Tensor",
    twin=reference.swiglu, kernel=_kernel, fake=_fake, save=_save, backward=_gradients,
)  # fmt: skip
define(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor? up) -> Tensor",
    twin=reference.swiglu_backward, kernel=_backward_kernel, fake=_backward_fake,
)  # fmt: skip


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) · up (Shazeer, 2020).

    Args:
        gate: [..., F], any strides; float32, bfloat16 or float16. Without ``up`` [..., 2F], gate first: its gradient is
            then one tensor, too.
        up: [..., F], any strides.

    Returns:
        [..., F], contiguous, in the dtype of ``gate``.

    Raises:
        ConfigError: ``gate`` and ``up`` have different shapes, or the last dimension has no two halves.
    """
    if up is not None and up.shape != gate.shape:
        raise ConfigError(f"gate is {tuple(gate.shape)} and up {tuple(up.shape)}; they must have one shape")
    if up is None and gate.shape[-1] % 2:
        raise ConfigError(f"gate is {tuple(gate.shape)}; without up its last dimension is split in two: make it even")
    return torch.ops.pipekern.swiglu(gate, up)
