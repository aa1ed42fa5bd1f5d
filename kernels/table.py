"""Many tensors in one launch: a table of their addresses in device memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipekern.errors import ConfigError

from .language import FLOATS, constant, jit, tl

CHUNK = 65536  # elements of a program: enough that finding them does not count
_CHUNK = constant(CHUNK)


class Table:
    """Lists of tensors as columns: row i holds the i-th of each, one shape and one order of elements in memory.

    Made once and kept: its rows are in device memory, as a captured graph needs them. What it is made of must stay
    where it is; a call that finds a tensor elsewhere makes new rows, which costs a copy to the device.

    Args:
        columns: A list of tensors each, of one length; one dtype a column, and one device. The order of a tensor's
            elements is that in memory, so it must fill its memory without gaps or overlaps (any permutation may).
        groups: For each row, which parameter group it is of; without, all are of the first.

    Raises:
        ConfigError: The columns do not go together.
    """

    def __init__(self, *columns: Sequence[Tensor], groups: Sequence[int] = ()):
        self.columns = [list(column) for column in columns]
        _check(self.columns)
        device = self.columns[0][0].device if self.columns[0] else torch.device("cpu")
        self.addresses = torch.tensor(addresses(self.columns), dtype=torch.int64)
        numbers = torch.tensor(groups or [0] * len(self), dtype=torch.int64)
        self.rows, self.owners = _rows(self.columns, numbers.to(device))

    def __len__(self) -> int:
        return len(self.columns[0])


def addresses(columns: Sequence[Sequence[Tensor]]) -> list[int]:
    return [tensor.data_ptr() for column in columns for tensor in column]


def current(rows: Tensor, owners: Tensor, kept: Tensor, *columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The rows of a table, made again where a tensor has moved since."""
    if addresses(columns) == kept.tolist():
        return rows, owners
    return _rows(columns, rows[:, 2])


def _rows(columns: Sequence[Sequence[Tensor]], groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (first chunk, elements, group, addresses), int64, and the row of every chunk, int32."""
    sizes = torch.tensor([tensor.numel() for tensor in columns[0]], dtype=torch.int64)
    chunks = (sizes + CHUNK - 1) // CHUNK
    pointers = torch.tensor(addresses(columns), dtype=torch.int64).view(len(columns), -1)
    known = torch.stack((chunks.cumsum(0) - chunks, sizes, *pointers), 1).to(groups.device)
    owners = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(chunks)
    return torch.cat((known[:, :2], groups.unsqueeze(1), known[:, 2:]), 1), owners.to(groups.device)


def _check(columns: list[list[Tensor]]) -> None:
    for number, column in enumerate(columns):
        if len(column) != len(columns[0]):
            raise ConfigError(
                f"column {number} has {len(column)} tensors and column 0 {len(columns[0])}: give one each"
            )
        for row, (tensor, first) in enumerate(zip(column, columns[0], strict=True)):
            place = f"row {row} of column {number}"
            if tensor.dtype not in FLOATS or tensor.dtype != column[0].dtype:
                raise ConfigError(
                    f"{place} is {tensor.dtype}; a column has one of {FLOATS}: make a table for each dtype"
                )
            if tensor.device != columns[0][0].device:
                raise ConfigError(
                    f"{place} is on {tensor.device}, and the first tensor on {columns[0][0].device}: move it"
                )
            if tensor.shape != first.shape or _order(tensor) != _order(first):
                raise ConfigError(
                    f"{place} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, that of column 0 "
                    f"{tuple(first.shape)} and {first.stride()}; they must be alike"
                )
            if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
                raise ConfigError(
                    f"{place} has strides {tensor.stride()} that leave gaps or overlap: make it contiguous"
                )


def _order(tensor: Tensor) -> list[int]:
    """The strides that count: those of dimensions with more than one index."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@jit
def chunk(rows, owners, WIDTH: tl.constexpr):
    """This program's row number and row, and the range of its elements."""
    program = tl.program_id(0)
    owner = tl.load(owners + program).to(tl.int64)
    row = rows + owner * WIDTH
    start = (program - tl.load(row)) * _CHUNK
    return owner, row, start, tl.minimum(start + _CHUNK, tl.load(row + 1))
