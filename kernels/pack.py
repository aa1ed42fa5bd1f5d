"""Tensors into a slot of bytes and back: bfloat16, or float8 e4m3 with a float32 scale for each 128 values of a row.

One pass: read once, written once. A slot holds the values row by row, then, for float8, the scales at the next
multiple of 16 bytes, ⌈columns / 128⌉ a row. A group's scale is its largest magnitude / 448, e4m3's largest value; a
group that holds something not finite comes out with NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipekern.errors import ConfigError

from . import reference
from .language import check_floats, jit, launch, narrow, tl
from .layout import even, lead, slabs, step
from .library import define

GROUP = 128
FORMATS = (torch.bfloat16, torch.float8_e4m3fn)
"""What values can be packed as."""


def scales_at(rows: int, columns: int) -> int:
    """The byte at which the scales of float8 values begin."""
    return -(-rows * columns // 16) * 16


def packed_bytes(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a slot for a tensor of ``shape`` packed as ``dtype``, bfloat16 or float8_e4m3fn.

    Raises:
        ConfigError: Another dtype.
    """
    if dtype not in FORMATS:
        raise ConfigError(f"dtype={dtype}; values are packed as one of {', '.join(map(str, FORMATS))}")
    columns = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    if dtype == torch.bfloat16:
        return 2 * rows * columns
    return scales_at(rows, columns) + 4 * rows * -(-columns // GROUP)


@jit
def _tile(T, C, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Rows [ROWS, 1, 1], groups [1, GROUPS, 1] and columns [1, GROUPS, 128] of this program."""
    across = tl.cdiv(C, GROUPS * 128)
    program = tl.program_id(0).to(tl.int64)
    row = program // across * ROWS + tl.arange(0, ROWS)[:, None, None]
    group = program % across * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    return row, group, group * 128 + tl.arange(0, 128)[None, None, :]


@jit
def _pack(
    x, x0, x1, x2, x3, values, scales, T, A, B, C,
    STEP: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    C = even(C, STEP)
    row, group, col = _tile(T, C, ROWS, GROUPS)
    mask = (row < T) & (col < C)
    value = tl.load(x + lead(row, A, B, x0, x1, x2, STEP) + col * x3, mask, 0).to(tl.float32)
    if scales is not None:
        finite = tl.abs(value) < float("inf")
        top = tl.max(tl.where(finite, tl.abs(value), float("inf")), 2, keep_dims=True)
        scale = tl.maximum(top, 1e-30) * (1 / 448)
        value = tl.minimum(tl.maximum(tl.where(top < float("inf"), value / scale, 0), -448.0), 448.0)
        scale = tl.where(top < float("inf"), scale, float("nan"))
        tl.store(scales + row * tl.cdiv(C, 128) + group, scale, (row < T) & (group * 128 < C))
    tl.store(values + row * C + col, narrow(value, values.dtype.element_ty), mask)


@jit
def _unpack(
    values, scales, x, x0, x1, x2, x3, T, A, B, C,
    ADD: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    C = even(C, STEP)
    row, group, col = _tile(T, C, ROWS, GROUPS)
    mask = (row < T) & (col < C)
    value = tl.load(values + row * C + col, mask, 0.0).to(tl.float32)
    if scales is not None:
        value *= tl.load(scales + row * tl.cdiv(C, 128) + group, (row < T) & (group * 128 < C), 0)
    x += lead(row, A, B, x0, x1, x2, STEP) + col * x3
    if ADD:
        value += tl.load(x, mask, 0).to(tl.float32)
    tl.store(x, narrow(value, x.dtype.element_ty), mask)


def _parts(slot: Tensor, rows: int, columns: int, float8: bool) -> tuple[Tensor, Tensor | None]:
    """Values and scales of a slot."""
    if not float8:
        return slot[: 2 * rows * columns].view(torch.bfloat16), None
    start = scales_at(rows, columns)
    scales = slot[start : start + 4 * rows * -(-columns // GROUP)].view(torch.float32)
    return slot[: rows * columns].view(torch.float8_e4m3fn), scales


def _run(kernel: object, slot: Tensor, x: Tensor, float8: bool, **constants: bool) -> None:
    x = torch.atleast_1d(x)
    columns = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    values, scales = _parts(slot, rows, columns, float8)
    groups = min(1 << max(-(-columns // GROUP) - 1, 0).bit_length(), 8)
    tile_rows = 4096 // (groups * GROUP)
    done = 0
    for slab in slabs(x):
        (of_x,) = slab.tensors
        across = -(-columns // (groups * GROUP))
        here = (values[done * columns :], None if scales is None else scales[done * -(-columns // GROUP) :])
        order = (*of_x, *here) if kernel is _pack else (*here, *of_x)
        launch(
            kernel, -(-slab.rows // tile_rows) * across, 4, *order, slab.rows, slab.b, slab.c, columns,
            **constants, STEP=step(columns, of_x), ROWS=tile_rows, GROUPS=groups,
        )  # fmt: skip
        done += slab.rows


def _kernel(x: Tensor, slot: Tensor, float8: bool) -> None:
    check_floats(x=x)
    _run(_pack, slot, x, float8)


def _unpack_kernel(slot: Tensor, out: Tensor, float8: bool, accumulate: bool) -> None:
    check_floats(out=out)
    _run(_unpack, slot, out, float8, ADD=accumulate)


define(
    "pack(Tensor x, Tensor(a!) slot, bool float8) -> ()",
    twin=reference.pack, kernel=_kernel, fake=lambda *_: None,
)  # fmt: skip
define(
    "unpack(Tensor slot, Tensor(a!) out, bool float8, bool accumulate) -> ()",
    twin=reference.unpack, kernel=_unpack_kernel, fake=lambda *_: None,
)  # fmt: skip


def _check(slot: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    needed = packed_bytes(shape, dtype)
    offset = 0 if torch.compiler.is_compiling() else slot.storage_offset()  # the compiler does not know it
    if slot.dtype != torch.uint8 or slot.dim() != 1 or not slot.is_contiguous() or offset % 16:
        raise ConfigError(
            f"a slot of {slot.dtype}, shape {tuple(slot.shape)}, {offset} elements into its memory; it "
            "must be contiguous bytes (uint8, one dimension) that start at a multiple of 16"
        )
    if len(slot) < needed:
        raise ConfigError(f"a slot of {len(slot)} bytes; {tuple(shape)} as {dtype} takes {needed}")


def pack(x: Tensor, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None) -> Tensor:
    """Write the values of ``x`` into a slot.

    Args:
        x: Any shape and strides; float32, bfloat16 or float16.
        dtype: bfloat16, or float8_e4m3fn with a scale for each 128 values of a row.
        out: The slot: at least ``packed_bytes(x.shape, dtype)`` bytes (uint8), at a multiple of 16.

    Returns:
        ``out``, or a new slot.

    Raises:
        ConfigError: The slot does not fit, or ``dtype`` is another.
    """
    slot = x.new_empty(packed_bytes(x.shape, dtype), dtype=torch.uint8) if out is None else out
    _check(slot, x.shape, dtype)
    torch.ops.pipekern.pack(x.detach(), slot, dtype == torch.float8_e4m3fn)
    return slot


def unpack(slot: Tensor, out: Tensor, dtype: torch.dtype = torch.bfloat16, accumulate: bool = False) -> Tensor:
    """Read a slot into ``out``, or add its values there.

    Args:
        slot: What :func:`pack` wrote.
        out: Of the shape that was packed, any strides; float32, bfloat16 or float16.
        dtype: What the values were packed as.
        accumulate: Add, in float32, to what is there.

    Returns:
        ``out``.

    Raises:
        ConfigError: The slot does not fit, or ``dtype`` is another.
    """
    _check(slot, out.shape, dtype)
    torch.ops.pipekern.unpack(slot, out, dtype == torch.float8_e4m3fn, accumulate)
    return out
