"""Rows that begin anywhere, as those of an odd vocabulary, read 16 bytes at a time.

A row is read from its first multiple of 16 bytes on, and what is before it with its end: only the last block is masked.
"""

from __future__ import annotations

from .language import jit, tl
from .layout import Placed, step


def peels(V: int, block: int, *placed: Placed) -> bool:
    """Whether rows have whole blocks, and do not all begin at a multiple of 16 bytes."""
    together = step(V, *placed)
    return block <= V and all(t.element_size() * together % 16 and last == 1 for t, *_, last in placed)


@jit
def start_of(x, PEEL: tl.constexpr):
    """The column of a row at which 16 aligned bytes begin, where rows do not begin so themselves (PEEL)."""
    first = 0
    if PEEL:
        first = ((-x.to(tl.int64)) & 15) * 8 // x.dtype.element_ty.primitive_bitwidth
    return first


@jit
def block_of(start, first, V, PEEL: tl.constexpr, BLOCK: tl.constexpr):
    """Elements of a block of a row that is read from ``first`` on, and at its end what is before: places, columns."""
    at = start + tl.arange(0, BLOCK).to(tl.int64)
    col = at
    if PEEL:
        col = tl.where(at + first < V, at + first, at + first - V)
    return at, col
