"""Gradients of weights: a partial sum a program, all of them added in their order in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .language import jit, launch, narrow, processors, tl
from .layout import even, step


def partials(like: Tensor, programs: int, vectors: int, wide: bool) -> Tensor:
    """Memory for a sum over rows a program: [programs, vectors, columns], float32; zeros where programs add to it."""
    make = torch.zeros if wide else torch.empty
    return make((programs, vectors, like.shape[-1]), dtype=torch.float32, device=like.device)


@jit
def _column(partial, out, P, stride, col, mask, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, P, ROWS):
        row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        total += tl.load(partial + row * stride + col, (row < P) & mask, 0)
    tl.store(out + col, narrow(tl.sum(total, 0)[None, :], out.dtype.element_ty), mask)


@jit
def _add_up(
    partial, first, second, P, H, VECTORS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program makes BLOCK columns of each vector that is wanted."""
    H = even(H, STEP)
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if first is not None:
        _column(partial, first, P, VECTORS * H, col, col < H, ROWS, BLOCK)
    if second is not None:
        _column(partial + H, second, P, VECTORS * H, col, col < H, ROWS, BLOCK)


def add_up(parts: list[Tensor], first: Tensor | None, second: Tensor | None = None) -> None:
    """Write the sums over programs into ``first`` and ``second``, vectors of any dtype; None is left out."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    programs, vectors, columns = whole.shape
    block = 1 << max(columns // (4 * processors(whole)) - 1, 15).bit_length()
    launch(
        _add_up, -(-columns // block), 8, whole, first, second, programs, columns,
        VECTORS=vectors, STEP=step(columns), ROWS=max(4096 // block, 1), BLOCK=block,
    )  # fmt: skip
