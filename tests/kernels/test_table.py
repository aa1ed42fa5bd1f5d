"""Tables of tensors: their rows, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from pipekern import ConfigError
from pipekern.kernels.table import CHUNK, Table, current


def test_golden(device: str) -> None:
    """A row: first chunk, elements, group, addresses; an empty tensor has no chunk."""
    first = [torch.zeros(CHUNK + 1, device=device), torch.zeros(0, device=device), torch.zeros(3, device=device)]
    second = [t.bfloat16() for t in first]
    table = Table(first, second, groups=[0, 1, 2])
    assert table.rows[:, :3].tolist() == [[0, CHUNK + 1, 0], [2, 0, 1], [2, 3, 2]]
    assert table.rows[:, 3:].T.tolist() == [[t.data_ptr() for t in column] for column in (first, second)]
    assert table.owners.tolist() == [0, 0, 2]


def test_tensors_that_moved(device: str) -> None:
    column = [torch.zeros(5, device=device), torch.zeros(6, device=device)]
    table = Table(column, groups=[3, 4])
    assert current(table.rows, table.owners, table.addresses, column)[0] is table.rows
    moved = [t.clone() for t in column]
    rows, owners = current(table.rows, table.owners, table.addresses, moved)
    assert rows[:, 2:].tolist() == [[3, moved[0].data_ptr()], [4, moved[1].data_ptr()]]
    assert torch.equal(owners, table.owners)


def test_refused(device: str) -> None:
    a, b = torch.zeros(4, 6, device=device), torch.zeros(4, 6, device=device)
    with pytest.raises(ConfigError, match="column 1 has 1 tensors and column 0 2"):
        Table([a, b], [a])
    with pytest.raises(ConfigError, match=r"row 1 of column 0 is torch.bfloat16"):
        Table([a, b.bfloat16()])
    with pytest.raises(ConfigError, match=r"row 0 of column 0 is torch.float64"):
        Table([a.double()])
    with pytest.raises(ConfigError, match=r"strides \(1, 4\), that of column 0 \(4, 6\) and \(6, 1\)"):
        Table([a], [torch.zeros(6, 4, device=device).T])
    with pytest.raises(ConfigError, match="leave gaps or overlap"):
        Table([a[:, :3]])
    Table([a.T], [b.T])
