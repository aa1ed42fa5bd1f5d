"""RMSNorm: y = h / sqrt(mean(h²) + eps) · weight over the last dimension, h = x or x + residual; statistics in float32.

Bytes an element in bfloat16, forward and backward: 4 and 6; with residual 8 and 8.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from . import reference
from .language import check_floats, jit, launch, narrow, processors, tl
from .layout import added, check_shapes, even, finish, lead, slabs, step, tile, vector
from .library import define
from .partials import add_up, partials


@jit
def _write(y, weight, w0, value, at, mask):
    if weight is not None:
        value *= tl.load(weight + at * w0, mask, 0).to(tl.float32)
    tl.store(y + at, narrow(value, y.dtype.element_ty), mask)


@jit
def _forward(
    x, x0, x1, x2, x3, residual, r0, r1, r2, r3, weight, w0, y, h, rstd, eps, T, B, C, H,
    STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program makes ROWS rows. Their first block stays in registers; more blocks (WIDE) are read twice."""
    H = even(H, STEP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    mask = (row < T) & (col < H)
    x += lead(row, B, C, x0, x1, x2, STEP)
    y += row * H
    if residual is not None:
        residual += lead(row, B, C, r0, r1, r2, STEP)
        h += row * H
    first = added(x, x3, residual, r3, h, col, mask)
    square = first * first
    if WIDE:
        for start in range(BLOCK, H, BLOCK):
            value = added(x, x3, residual, r3, h, start + col, (row < T) & (start + col < H))
            square += value * value
    scale = tl.rsqrt(tl.sum(square, 1)[:, None] / H + eps)
    tl.store(rstd + row, scale, row < T)
    _write(y, weight, w0, first * scale, col, mask)
    if WIDE:
        for start in range(BLOCK, H, BLOCK):
            mask = (row < T) & (start + col < H)
            value = added(x, x3, residual, r3, h, start + col, mask)
            _write(y, weight, w0, value * scale, start + col, mask)


@jit
def _pair(dy, d3, h, h3, weight, w0, scale, at, mask):
    """Columns ``at`` of weight · dy, of the normalised h, and of dy times the latter."""
    grad = tl.load(dy + at * d3, mask, 0).to(tl.float32)
    normal = tl.load(h + at * h3, mask, 0).to(tl.float32) * scale
    product = grad * normal
    if weight is not None:
        grad *= tl.load(weight + at * w0, mask, 0).to(tl.float32)
    return grad, normal, product


@jit
def _backward(
    dy, d0, d1, d2, d3, dh, e0, e1, e2, e3, h, h0, h1, h2, h3, weight, w0, rstd, dx, partial, T, B, C, H,
    STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program makes every n-th tile and sums its share of the weight's gradient in that order."""
    H = even(H, STEP)
    col = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    if weight is not None:
        partial += tl.program_id(0).to(tl.int64) * H
    for start in range(tl.program_id(0).to(tl.int64) * ROWS, T, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < T) & (col < H)
        of_dy = dy + lead(row, B, C, d0, d1, d2, STEP)
        of_h = h + lead(row, B, C, h0, h1, h2, STEP)
        of_dx = dx + row * H
        of_dh = None if dh is None else dh + lead(row, B, C, e0, e1, e2, STEP)
        scale = tl.load(rstd + row, row < T, 0)
        grad, normal, product = _pair(of_dy, d3, of_h, h3, weight, w0, scale, col, mask)
        dot = tl.sum(grad * normal, 1)[:, None]
        dw += product
        if WIDE:
            for skip in range(BLOCK, H, BLOCK):
                at = skip + col
                more, unit, product = _pair(of_dy, d3, of_h, h3, weight, w0, scale, at, (row < T) & (at < H))
                dot += tl.sum(more * unit, 1)[:, None]
                if weight is not None:
                    tl.store(partial + at, tl.load(partial + at, at < H) + product, at < H)
        dot /= H
        finish(of_dx, of_dh, e3, (grad - normal * dot) * scale, col, mask)
        if WIDE:
            for skip in range(BLOCK, H, BLOCK):
                at = skip + col
                mask = (row < T) & (at < H)
                more, unit, product = _pair(of_dy, d3, of_h, h3, weight, w0, scale, at, mask)
                finish(of_dx, of_dh, e3, (more - unit * dot) * scale, at, mask)
    if weight is not None:
        tl.store(partial + col, tl.sum(dw, 0)[None, :], col < H)


def _kernel(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    check_floats(x=x, weight=weight, residual=residual)
    y, h, rstd = _fake(x, weight, residual, eps)
    rows, block, warps, wide = tile(x.shape[-1], per_thread=32, most=16384)
    for slab in slabs(x, residual, y, None if residual is None else h, rstd):
        of_x, of_residual, (of_y, *_), (of_h, *_), (of_rstd, *_) = slab.tensors
        launch(
            _forward, -(-slab.rows // rows), warps, *of_x, *of_residual, *vector(weight), of_y, of_h, of_rstd, eps,
            slab.rows, slab.b, slab.c, x.shape[-1],
            STEP=step(x.shape[-1], of_x, of_residual), ROWS=rows, BLOCK=block, WIDE=wide,
        )  # fmt: skip
    return y, h, rstd


def _fake(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = None if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=wide),
        x.new_empty((*x.shape[:-1], 1), dtype=reference.statistics(x)),
    )


def _backward_kernel(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    check_floats(dy=dy, dh=dh)
    dx, dw = _backward_fake(dy, dh, h, weight, rstd)
    rows, block, warps, wide = tile(h.shape[-1], per_thread=16, most=8192)
    parts: list[Tensor] = []
    for slab in slabs(dy, dh, h, rstd, dx):
        of_dy, of_dh, of_h, (of_rstd, *_), (of_dx, *_) = slab.tensors
        programs = min(-(-slab.rows // rows), processors(h) * max(32 // warps, 1))
        if weight is not None:
            parts.append(partials(h, programs, 1, wide))
        launch(
            _backward, programs, warps, *of_dy, *of_dh, *of_h, *vector(weight), of_rstd, of_dx,
            parts[-1] if parts else None, slab.rows, slab.b, slab.c, h.shape[-1],
            STEP=step(h.shape[-1], of_dy, of_dh, of_h), ROWS=rows, BLOCK=block, WIDE=wide,
        )  # fmt: skip
    if weight is not None:
        add_up(parts, dw)
    return dx, dw


def _backward_fake(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, residual, _ = inputs
    _, h, rstd = output
    ctx.save_for_backward(x if residual is None else h, weight, rstd)
    ctx.mark_non_differentiable(*([h, rstd] if residual is None else [rstd]))
    ctx.set_materialize_grads(False)
    ctx.added = residual is not None


def _gradients(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    h, weight, rstd = ctx.saved_tensors
    if dy is None:
        return dh, None, dh, None
    dx, dw = torch.ops.pipekern.rms_norm_backward(dy, dh, h, weight, rstd)
    return dx, None if weight is None else dw, dx if ctx.added else None, None


define(
    "rms_norm(Tensor x, Tensor? weight, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor)",
    twin=reference.rms_norm, kernel=_kernel, fake=_fake, save=_save, backward=_gradients,
)  # fmt: skip
define(
    "rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor rstd) -> (Tensor, Tensor)",
    twin=reference.rms_norm_backward, kernel=_backward_kernel, fake=_backward_fake,
)  # fmt: skip


@overload
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None) -> Any:
    """RMSNorm over the last dimension (Zhang and Sennrich, 2019); with ``residual`` also the sum that was normalised.

    Args:
        x: [..., H], any strides; float32, bfloat16 or float16.
        weight: [H], any of these dtypes, or None for 1.
        eps: Added to the mean square.
        residual: [..., H], added to ``x`` first; the sum has the wider of both dtypes.

    Returns:
        y [..., H] in the dtype of ``x``; with ``residual`` (y, x + residual).

    Raises:
        ConfigError: The shapes do not go together.
    """
    check_shapes(x, residual, weight=weight)
    y, h, _ = torch.ops.pipekern.rms_norm(x, weight, residual, eps)
    return y if residual is None else (y, h)
