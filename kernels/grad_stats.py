"""Square sums of many gradients, and how many of their values are not finite. Bytes an element in float32: 4.

Every chunk has a partial sum, and every parameter one made of them in their order, so that neither the run nor the
split of a model over ranks changes a bit. Two launches: within one, a parameter's last chunk would have to find the
others' sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .language import element, jit, launch, tl
from .library import define
from .table import CHUNK, Table, chunk, current


@jit
def _partials(rows, owners, partial, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    _, row, start, end = chunk(rows, owners, 4)
    grad = tl.load(row + 3)
    aligned = grad % 16 == 0
    grad = grad.to(tl.pointer_type(GRAD))
    squares = tl.zeros((BLOCK,), tl.float32)
    wrong = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        if aligned & (first + BLOCK <= end):
            value = tl.load(tl.multiple_of(grad, 16) + at).to(tl.float32)
        else:
            value = tl.load(grad + at, at < end, 0).to(tl.float32)
        squares += value * value
        wrong += tl.where(tl.abs(value) < float("inf"), 0.0, 1.0)
    tl.store(partial + 2 * tl.program_id(0), tl.sum(squares, 0))
    tl.store(partial + 2 * tl.program_id(0) + 1, tl.sum(wrong, 0))


@jit
def _totals(rows, partial, stats, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    row = rows + tl.program_id(0) * 4
    count = tl.cdiv(tl.load(row + 1), CHUNK)
    partial += tl.load(row) * 2
    squares = tl.zeros((BLOCK,), tl.float32)
    wrong = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        squares += tl.load(partial + 2 * at, at < count, 0)
        wrong += tl.load(partial + 2 * at + 1, at < count, 0)
    tl.store(stats + 2 * tl.program_id(0), tl.sum(squares, 0))
    tl.store(stats + 2 * tl.program_id(0) + 1, tl.sum(wrong, 0))


def _kernel(grads: list[Tensor], rows: Tensor, owners: Tensor, addresses: Tensor) -> Tensor:
    stats = _fake(grads, rows, owners, addresses)
    if grads:
        rows, owners = current(rows, owners, addresses, grads)
        partial = stats.new_empty(len(owners), 2)
        launch(_partials, len(owners), 4, rows, owners, partial, GRAD=element(grads[0].dtype), BLOCK=4096)
        launch(_totals, len(grads), 1, rows, partial, stats, CHUNK=CHUNK, BLOCK=128)
    return stats


def _fake(grads: list[Tensor], rows: Tensor, owners: Tensor, addresses: Tensor) -> Tensor:
    return rows.new_empty((len(grads), 2), dtype=torch.float32)


define(
    "grad_stats(Tensor[] grads, Tensor rows, Tensor owners, Tensor addresses) -> Tensor",
    twin=reference.grad_stats, kernel=_kernel, fake=_fake,
)  # fmt: skip


def grad_stats(table: Table) -> Tensor:
    """float32 [rows, 2] on the device: Σ value² and the number of values that are not finite, a row each.

    Args:
        table: ``Table(grads)``.
    """
    (grads,) = table.columns
    with torch.no_grad():
        return torch.ops.pipekern.grad_stats(grads, table.rows, table.owners, table.addresses)
