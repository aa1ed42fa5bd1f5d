"""GELU of x + bias, exact or by tanh. Bytes an element in bfloat16, forward and backward: 4 and 6."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pipekern.errors import ConfigError

from . import reference
from .language import check_floats, constant, jit, launch, narrow, processors, tl
from .layout import check_shapes, even, lead, pieces, place, slabs, step, vector
from .library import define
from .partials import add_up, partials

_SQRT_HALF = constant(0.5**0.5)
_INV_SQRT_2PI = constant((2 * math.pi) ** -0.5)
_SCALE = constant(2 * (2 / math.pi) ** 0.5)  # the tanh form is v · sigmoid(_SCALE · v + _CUBIC · v³)
_CUBIC = constant(0.044715 * 2 * (2 / math.pi) ** 0.5)


@jit
def _forward(
    x, x0, x1, x2, x3, bias, b0, y, T, B, C, F,
    TANH: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    F = even(F, STEP)
    row, col, mask = place(T, F, ROWS, BLOCK)
    v = tl.load(x + lead(row, B, C, x0, x1, x2, STEP) + col * x3, mask, 0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + col * b0, col < F, 0).to(tl.float32)
    if TANH:
        v *= tl.sigmoid(v * (v * v * _CUBIC + _SCALE))
    else:
        v *= 0.5 + 0.5 * tl.erf(v * _SQRT_HALF)
    tl.store(y + row * F + col, narrow(v, y.dtype.element_ty), mask)


@jit
def _slope(v, TANH: tl.constexpr):
    if TANH:
        u = v * (v * v * _CUBIC + _SCALE)
        s = tl.sigmoid(u)
        slope = s + s * tl.sigmoid(-u) * (v * (v * v * _CUBIC * 3 + _SCALE))
    else:
        slope = 0.5 + 0.5 * tl.erf(v * _SQRT_HALF) + tl.exp(-0.5 * v * v) * v * _INV_SQRT_2PI
    return slope


@jit
def _backward(
    dy, d0, d1, d2, d3, x, x0, x1, x2, x3, bias, b0, dx, partial, T, B, C, F, GROUPS,
    TANH: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (group, columns) makes every GROUPS-th tile of its columns, and sums its share of the bias's gradient."""
    F = even(F, STEP)
    across = tl.cdiv(F, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    col = program % across * BLOCK + tl.arange(0, BLOCK)[None, :]
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(program // across * ROWS, T, GROUPS * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < T) & (col < F)
        grad = tl.load(dy + lead(row, B, C, d0, d1, d2, STEP) + col * d3, mask, 0).to(tl.float32)
        v = tl.load(x + lead(row, B, C, x0, x1, x2, STEP) + col * x3, mask, 0).to(tl.float32)
        if bias is not None:
            v += tl.load(bias + col * b0, col < F, 0).to(tl.float32)
        grad *= _slope(v, TANH)
        db += grad
        tl.store(dx + row * F + col, narrow(grad, dx.dtype.element_ty), mask)
    if bias is not None:
        tl.store(partial + program // across * F + col, tl.sum(db, 0)[None, :], col < F)


def _kernel(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    check_floats(x=x, bias=bias)
    y = _fake(x, bias, approximate)
    rows, block, warps, _ = pieces(x.shape[-1])
    for slab in slabs(x, y):
        of_x, (of_y, *_) = slab.tensors
        launch(
            _forward, -(-slab.rows // rows) * -(-x.shape[-1] // block), warps, *of_x, *vector(bias), of_y,
            slab.rows, slab.b, slab.c, x.shape[-1], TANH=approximate == "tanh", STEP=step(x.shape[-1], of_x),
            ROWS=rows, BLOCK=block,
        )  # fmt: skip
    return y


def _fake(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


def _backward_kernel(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    check_floats(dy=dy)
    dx, db = _backward_fake(dy, x, bias, approximate)
    rows, block, warps, _ = pieces(x.shape[-1])
    across = max(-(-x.shape[-1] // block), 1)
    parts: list[Tensor] = []
    for slab in slabs(dy, x, dx):
        of_dy, of_x, (of_dx, *_) = slab.tensors
        groups = -(-slab.rows // rows)
        if bias is not None:
            groups = min(groups, max(16 * processors(x) // across, 1))
            parts.append(partials(x, groups, 1, wide=False))
        launch(
            _backward, groups * across, 2 * warps, *of_dy, *of_x, *vector(bias), of_dx,
            parts[-1] if parts else None, slab.rows, slab.b, slab.c, x.shape[-1], groups,
            TANH=approximate == "tanh", STEP=step(x.shape[-1], of_dy, of_x), ROWS=rows, BLOCK=block,
        )  # fmt: skip
    if bias is not None:
        add_up(parts, db)
    return dx, db


def _backward_fake(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None, str], output: Tensor) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, bias = ctx.saved_tensors
    dx, db = torch.ops.pipekern.gelu_backward(dy, x, bias, ctx.approximate)
    return dx, None if bias is None else db, None


define(
    "gelu(Tensor x, Tensor? bias, str approximate) -> Tensor",
    twin=reference.gelu, kernel=_kernel, fake=_fake, save=_save, backward=_gradients,
)  # fmt: skip
define(
    "gelu_backward(Tensor dy, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)",
    twin=reference.gelu_backward, kernel=_backward_kernel, fake=_backward_fake,
)  # fmt: skip


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """GELU (Hendrycks and Gimpel, 2016) of ``x + bias``.

    Args:
        x: [..., F], any strides; float32, bfloat16 or float16.
        bias: [F], any of these dtypes.
        approximate: "none" (by erf) or "tanh", as ``torch.nn.functional.gelu``.

    Returns:
        [..., F], contiguous, in the dtype of ``x``.

    Raises:
        ConfigError: ``approximate`` is neither, or ``bias`` has another shape.
    """
    if approximate not in ("none", "tanh"):
        raise ConfigError(f'approximate={approximate!r}; it must be "none" or "tanh"')
    check_shapes(x, bias=bias)
    return torch.ops.pipekern.gelu(x, bias, approximate)
