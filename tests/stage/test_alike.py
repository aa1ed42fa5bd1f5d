"""What a graph says of a value: whether all tensor-parallel parts have it alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipekern.stage.alike import is_alike, mark
from pipekern.stage.division import _Here


def _leaf() -> Tensor:
    return torch.randn(2, 3, requires_grad=True)


def test_golden() -> None:
    """A layer of whole parameters gives what is alike, if what it gets is."""
    layer = nn.Linear(3, 3)
    assert not is_alike(layer(_leaf()))
    assert is_alike(layer(mark(_leaf())))
    assert is_alike(layer(torch.randn(2, 3)))  # a batch, which all parts are given
    assert is_alike(mark(_leaf())) and not is_alike(_leaf())


def test_what_leaves_divided_modules() -> None:
    """In shards or whole, whatever was before; what entered one says nothing."""
    known, unknown = mark(_leaf()) * 2, _leaf() * 2
    shards, whole, inside = _Here.apply(known, True), _Here.apply(unknown, False), _Here.apply(known, None)
    assert not is_alike(shards + 1)
    assert is_alike(whole + 1)
    assert is_alike(inside)
    assert not is_alike(whole + shards)
    assert not is_alike(_Here.apply(unknown, None))
    assert is_alike(_Here.apply(shards, False) + known)
