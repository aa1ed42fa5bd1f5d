"""Many gradients added to their float32 sums, in one launch. Bytes an element, gradients in bfloat16: 10."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .language import element, jit, launch, narrow, tl
from .library import define
from .table import Table, chunk, current


@jit
def _add(main, grad, at, mask):
    value = tl.load(main + at, mask).to(tl.float32) + tl.load(grad + at, mask).to(tl.float32)
    tl.store(main + at, narrow(value, main.dtype.element_ty), mask)


@jit
def _accumulate(rows, owners, MAIN: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    _, row, start, end = chunk(rows, owners, 5)
    main = tl.load(row + 3)
    grad = tl.load(row + 4)
    aligned = (main | grad) % 16 == 0
    main = main.to(tl.pointer_type(MAIN))
    grad = grad.to(tl.pointer_type(GRAD))
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        if aligned & (first + BLOCK <= end):
            _add(tl.multiple_of(main, 16), tl.multiple_of(grad, 16), at, None)
        else:
            _add(main, grad, at, at < end)


def _kernel(main: list[Tensor], grads: list[Tensor], rows: Tensor, owners: Tensor, addresses: Tensor) -> None:
    if main:
        rows, owners = current(rows, owners, addresses, main, grads)
        types = element(main[0].dtype), element(grads[0].dtype)
        launch(_accumulate, len(owners), 4, rows, owners, MAIN=types[0], GRAD=types[1], BLOCK=2048)


define(
    "accumulate_(Tensor(a!)[] main, Tensor[] grads, Tensor rows, Tensor owners, Tensor addresses) -> ()",
    twin=reference.accumulate_, kernel=_kernel, fake=lambda *_: None,
)  # fmt: skip


def accumulate_(table: Table) -> None:
    """Column 0 ← column 0 + column 1, summed in float32.

    Args:
        table: ``Table(main, grads)``: sums, of any dtype but meant as float32, and what is added to them.
    """
    main, grads = table.columns
    with torch.no_grad():
        torch.ops.pipekern.accumulate_(main, grads, table.rows, table.owners, table.addresses)
