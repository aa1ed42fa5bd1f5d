"""Where the rows of strided tensors lie: any view is read where it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pipekern.errors import ConfigError

from .language import jit, narrow, tl

Placed = tuple[Any, int, int, int, int]  # a tensor (or None) and its strides: three leading ones, the last


class Slab(NamedTuple):
    """Rows over three leading sizes (A, ``b``, ``c``), A·b·c = ``rows``, and the tensors that hold them."""

    rows: int
    b: int
    c: int
    tensors: list[Placed]


def slabs(*tensors: Tensor | None) -> Iterator[Slab]:
    """Tensors [..., columns] of one leading shape, as rows; ``columns`` may differ, and None stays None.

    Leading dimensions become one where the strides of all tensors let them. There is one slab, unless more than three
    dimensions are left: then one for each step of the first.
    """
    there = [t for t in tensors if t is not None]
    if all(t.is_contiguous() for t in there):
        rows = math.prod(there[0].shape[:-1])
        yield Slab(rows, 1, 1, [(t, 0, 0, 0, 0) if t is None else (t, t.shape[-1], 0, 0, 1) for t in tensors])
        return
    merged = _merge(there)
    if len(merged) > 3:
        for parts in zip(*(t.unbind() for t in there), strict=True):
            rest = iter(parts)
            yield from slabs(*(None if t is None else next(rest) for t in tensors))
        return
    merged += [(1, [0] * len(there))] * (3 - len(merged))
    (a, *_), (b, *_), (c, *_) = merged
    leading = iter(zip(*(steps for _, steps in merged), strict=True))
    yield Slab(
        a * b * c, b, c, [(None, 0, 0, 0, 0) if t is None else (t, *next(leading), t.stride(-1)) for t in tensors]
    )


def _merge(tensors: list[Tensor]) -> list[tuple[int, list[int]]]:
    """The leading dimensions that are left, outermost first: size, and stride in each tensor."""
    merged: list[tuple[int, list[int]]] = []
    for size, *steps in zip(tensors[0].shape[:-1], *(t.stride()[:-1] for t in tensors), strict=True):
        if size == 1:
            continue
        if merged and all(outer == step * size for outer, step in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    return merged


class Tile(NamedTuple):
    """``rows`` × ``block`` elements of a program and its warps; ``wide`` where a row needs several blocks."""

    rows: int
    block: int
    warps: int
    wide: bool


def tile(columns: int, per_thread: int, most: int) -> Tile:
    """The tile for whole rows: at least 4096 elements, so that several 16-byte loads a thread are on their way at once.

    Rows of more than ``most`` elements, which registers would not hold, are cut into blocks.
    """
    wide = columns > most
    block = 4096 if wide else 1 << max(columns - 1, 15).bit_length()
    rows = max(4096 // block, 1)
    return Tile(rows, block, rows * block // (32 * per_thread), wide)


def pieces(columns: int) -> Tile:
    """The tile for elements on their own: 4096 of them, at most 1024 of a row."""
    block = min(1 << max(columns - 1, 15).bit_length(), 1024)
    return Tile(4096 // block, block, 4, columns > block)


def check_shapes(x: Tensor, residual: Tensor | None = None, **vectors: Tensor | None) -> None:
    """Raises ConfigError where ``residual`` is not of the shape of ``x``, or a vector not of its last dimension."""
    wanted = {"residual": (residual, x.shape), **{name: (t, x.shape[-1:]) for name, t in vectors.items()}}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ConfigError(f"{name} is {tuple(tensor.shape)}; for x {tuple(x.shape)} it must be {tuple(shape)}")


def vector(weight: Tensor | None) -> tuple[Tensor | None, int]:
    """A weight [columns] and its stride."""
    return (None, 0) if weight is None else (weight, weight.stride(0))


def step(columns: int, *placed: Sequence[Any]) -> int:
    """What divides the rows' length and all strides of ``placed`` (tensor, strides) but the last, up to 16.

    So many elements can be read at a time. Triton itself finds out no more than whether 16 divides a number, and 8
    bfloat16 elements fill a 16-byte load.
    """
    return math.gcd(columns, *(stride for _, *leading, _ in placed for stride in leading), 16)


@jit
def even(value, STEP: tl.constexpr):
    """``value``, which STEP divides, in a form from which the compiler sees it."""
    return value // STEP * STEP


@jit
def lead(row, b, c, s0, s1, s2, STEP: tl.constexpr):
    """The offset of a row, which STEP divides; sizes of 1 cost nothing, for Triton compiles them in."""
    outer = row // c
    return even((outer // b) * s0 + (outer % b) * s1 + (row % c) * s2, STEP)


@jit
def added(x, x3, residual, r3, h, at, mask):
    """Columns ``at`` of h = x + residual, stored where a residual is added, and as rounded there."""
    value = tl.load(x + at * x3, mask, 0).to(tl.float32)
    if residual is not None:
        value = narrow(value + tl.load(residual + at * r3, mask, 0).to(tl.float32), h.dtype.element_ty)
        tl.store(h + at, value, mask)
        value = value.to(tl.float32)
    return value


@jit
def finish(dx, dh, e3, value, at, mask):
    """Store columns ``at`` of a gradient, to which dh is added where there is one."""
    if dh is not None:
        value += tl.load(dh + at * e3, mask, 0).to(tl.float32)
    tl.store(dx + at, narrow(value, dx.dtype.element_ty), mask)


@jit
def place(T, F, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns and mask of this program's tile of [T, F]; neighbours lie in the same rows."""
    across = tl.cdiv(F, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    row = program // across * ROWS + tl.arange(0, ROWS)[:, None]
    col = program % across * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, col, (row < T) & (col < F)
