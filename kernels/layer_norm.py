"""LayerNorm: y = (h − mean) / sqrt(var + eps) · weight + bias over the last dimension, h = x or x + residual.

Statistics in float32, the variance from centred values, whose own mean corrects both (Chan et al., 1983). Bytes an
element in bfloat16, forward and backward: 4 and 6; with residual 8 and 8.
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
def _write(y, weight, w0, bias, b0, value, at, mask):
    if weight is not None:
        value *= tl.load(weight + at * w0, mask, 0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + at * b0, mask, 0).to(tl.float32)
    tl.store(y + at, narrow(value, y.dtype.element_ty), mask)


@jit
def _forward(
    x, x0, x1, x2, x3, residual, r0, r1, r2, r3, weight, w0, bias, b0, y, h, stats, eps, T, B, C, H,
    STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program makes ROWS rows. Their first block stays in registers; more blocks (WIDE) are read three times."""
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
    total = first
    if WIDE:
        for start in range(BLOCK, H, BLOCK):
            total += added(x, x3, residual, r3, h, start + col, (row < T) & (start + col < H))
    mean = tl.sum(total, 1)[:, None] / H
    first = tl.where(mask, first - mean, 0)
    rest = first
    square = first * first
    if WIDE:
        for start in range(BLOCK, H, BLOCK):
            mask = (row < T) & (start + col < H)
            value = tl.where(mask, added(x, x3, residual, r3, h, start + col, mask) - mean, 0)
            rest += value
            square += value * value
    shift = tl.sum(rest, 1)[:, None] / H  # what rounding left of the mean
    scale = tl.rsqrt(tl.sum(square, 1)[:, None] / H - shift * shift + eps)
    first -= shift
    mean += shift
    tl.store(stats + 2 * row, mean, row < T)
    tl.store(stats + 2 * row + 1, scale, row < T)
    _write(y, weight, w0, bias, b0, first * scale, col, (row < T) & (col < H))
    if WIDE:
        for start in range(BLOCK, H, BLOCK):
            mask = (row < T) & (start + col < H)
            value = added(x, x3, residual, r3, h, start + col, mask)
            _write(y, weight, w0, bias, b0, (value - mean) * scale, start + col, mask)


@jit
def _pair(dy, d3, h, h3, weight, w0, mean, scale, at, mask):
    """Columns ``at`` of dy, of weight · dy, and of the normalised h."""
    grad = tl.load(dy + at * d3, mask, 0).to(tl.float32)
    normal = (tl.load(h + at * h3, mask, 0).to(tl.float32) - mean) * scale
    scaled = grad
    if weight is not None:
        scaled = grad * tl.load(weight + at * w0, mask, 0).to(tl.float32)
    return grad, scaled, normal


@jit
def _beyond(dy, d3, h, h3, weight, w0, mean, scale, partial, dot, shift, there, col, H, BLOCK: tl.constexpr):
    """Sums of rows with what is beyond their first block, whose shares of gradients are added in ``partial``."""
    for skip in range(BLOCK, H, BLOCK):
        at = skip + col
        grad, scaled, normal = _pair(dy, d3, h, h3, weight, w0, mean, scale, at, there & (at < H))
        dot += tl.sum(scaled * normal, 1)[:, None]
        shift += tl.sum(scaled, 1)[:, None]
        if partial is not None:
            tl.store(partial + at, tl.load(partial + at, at < H) + grad * normal, at < H)
            tl.store(partial + H + at, tl.load(partial + H + at, at < H) + grad, at < H)
    return dot, shift


@jit
def _backward(
    dy, d0, d1, d2, d3, dh, e0, e1, e2, e3, h, h0, h1, h2, h3, weight, w0, stats, dx, partial, T, B, C, H,
    STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program makes every n-th tile and sums its share of the gradients of weight and bias in that order."""
    H = even(H, STEP)
    col = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    if partial is not None:
        partial += tl.program_id(0).to(tl.int64) * 2 * H
    for start in range(tl.program_id(0).to(tl.int64) * ROWS, T, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < T) & (col < H)
        of_dy = dy + lead(row, B, C, d0, d1, d2, STEP)
        of_h = h + lead(row, B, C, h0, h1, h2, STEP)
        of_dx = dx + row * H
        of_dh = None if dh is None else dh + lead(row, B, C, e0, e1, e2, STEP)
        mean = tl.load(stats + 2 * row, row < T, 0)
        scale = tl.load(stats + 2 * row + 1, row < T, 0)
        grad, scaled, normal = _pair(of_dy, d3, of_h, h3, weight, w0, mean, scale, col, mask)
        dot = tl.sum(scaled * normal, 1)[:, None]
        shift = tl.sum(scaled, 1)[:, None]
        dw += grad * normal
        db += grad
        if WIDE:
            dot, shift = _beyond(
                of_dy, d3, of_h, h3, weight, w0, mean, scale, partial, dot, shift, row < T, col, H, BLOCK
            )
        dot /= H
        shift /= H
        finish(of_dx, of_dh, e3, (scaled - shift - normal * dot) * scale, col, mask)
        if WIDE:
            for skip in range(BLOCK, H, BLOCK):
                at = skip + col
                mask = (row < T) & (at < H)
                _, s, n = _pair(of_dy, d3, of_h, h3, weight, w0, mean, scale, at, mask)
                finish(of_dx, of_dh, e3, (s - shift - n * dot) * scale, at, mask)
    if partial is not None:
        tl.store(partial + col, tl.sum(dw, 0)[None, :], col < H)
        tl.store(partial + H + col, tl.sum(db, 0)[None, :], col < H)


def _kernel(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_floats(x=x, weight=weight, bias=bias, residual=residual)
    y, h, stats = _fake(x, weight, bias, residual, eps)
    rows, block, warps, wide = tile(x.shape[-1], per_thread=32, most=16384)
    for slab in slabs(x, residual, y, None if residual is None else h, stats):
        of_x, of_residual, (of_y, *_), (of_h, *_), (of_stats, *_) = slab.tensors
        launch(
            _forward, -(-slab.rows // rows), warps, *of_x, *of_residual, *vector(weight), *vector(bias), of_y, of_h,
            of_stats, eps, slab.rows, slab.b, slab.c, x.shape[-1],
            STEP=step(x.shape[-1], of_x, of_residual), ROWS=rows, BLOCK=block, WIDE=wide,
        )  # fmt: skip
    return y, h, stats


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = None if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=wide),
        x.new_empty((*x.shape[:-1], 2), dtype=reference.statistics(x)),
    )


def _backward_kernel(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_floats(dy=dy, dh=dh)
    dx, dw, db = _backward_fake(dy, dh, h, weight, bias, stats)
    rows, block, warps, wide = tile(h.shape[-1], per_thread=16, most=8192)
    parts: list[Tensor] = []
    for slab in slabs(dy, dh, h, stats, dx):
        of_dy, of_dh, of_h, (of_stats, *_), (of_dx, *_) = slab.tensors
        programs = min(-(-slab.rows // rows), processors(h) * max(32 // warps, 1))
        if weight is not None or bias is not None:
            parts.append(partials(h, programs, 2, wide))
        launch(
            _backward, programs, warps, *of_dy, *of_dh, *of_h, *vector(weight), of_stats, of_dx,
            parts[-1] if parts else None, slab.rows, slab.b, slab.c, h.shape[-1],
            STEP=step(h.shape[-1], of_dy, of_dh, of_h), ROWS=rows, BLOCK=block, WIDE=wide,
        )  # fmt: skip
    if weight is not None or bias is not None:
        add_up(parts, None if weight is None else dw, None if bias is None else db)
    return dx, dw, db


def _backward_fake(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dw, db = (h.new_empty(0) if t is None else t.new_empty(t.shape) for t in (weight, bias))
    return h.new_empty(h.shape), dw, db


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, _ = inputs
    _, h, stats = output
    ctx.save_for_backward(x if residual is None else h, weight, bias, stats)
    ctx.mark_non_differentiable(*([h, stats] if residual is None else [stats]))
    ctx.set_materialize_grads(False)
    ctx.added = residual is not None


def _gradients(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    h, weight, bias, stats = ctx.saved_tensors
    if dy is None:
        return dh, None, None, dh, None
    dx, dw, db = torch.ops.pipekern.layer_norm_backward(dy, dh, h, weight, bias, stats)
    return dx, None if weight is None else dw, None if bias is None else db, dx if ctx.added else None, None


define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor)",
    twin=reference.layer_norm, kernel=_kernel, fake=_fake, save=_save, backward=_gradients,
)  # fmt: skip
define(
    "layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor? bias, Tensor stats)"
    " -> (Tensor, Tensor, Tensor)",
    twin=reference.layer_norm_backward, kernel=_backward_kernel, fake=_backward_fake,
)  # fmt: skip


@overload
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Any:
    """LayerNorm over the last dimension (Ba et al., 2016); with ``residual`` also the sum that was normalised.

    Args:
        x: [..., H], any strides; float32, bfloat16 or float16.
        weight: [H], any of these dtypes, or None for 1.
        bias: [H], any of these dtypes, or None for 0.
        eps: Added to the variance.
        residual: [..., H], added to ``x`` first; the sum has the wider of both dtypes.

    Returns:
        y [..., H] in the dtype of ``x``; with ``residual`` (y, x + residual).

    Raises:
        ConfigError: The shapes do not go together.
    """
    check_shapes(x, residual, weight=weight, bias=bias)
    y, h, _ = torch.ops.pipekern.layer_norm(x, weight, bias, residual, eps)
    return y if residual is None else (y, h)
