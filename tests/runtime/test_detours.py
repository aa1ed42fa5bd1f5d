"""A value in parts: which leaf is where, and how the parts' gradients add up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipekern.runtime.detours import Spread


def _leaf() -> Tensor:
    return torch.zeros(2, requires_grad=True)


def _ones(factor: float) -> Tensor:
    return torch.full((2,), factor)


def test_golden() -> None:
    """A leaf in both parts gets the sum of its gradients; one without any stays without."""
    a, b, c = _leaf(), _leaf(), _leaf()
    spread = Spread((a, b, c, torch.zeros(2)), [(a, b), {"c": c, "b": b}])
    got = spread.gather([[None, _ones(2)], [_ones(4), _ones(3)]])
    assert got[0] is None
    assert torch.equal(torch.stack([g for g in got if g is not None]), torch.tensor([[5.0, 5.0], [4.0, 4.0]]))


def test_one_leaf_and_none() -> None:
    """As stages give them: one tensor alone, nothing where there is no leaf."""
    a = _leaf()
    spread = Spread((a, 1), [{"a": a}, 1])
    one = _ones(2)
    assert spread.gather([one, None]) == [one]
    assert spread.gather([None, None]) == [None]
    assert spread.scatter(one) == [one, None]


def test_what_is_scattered_is_gathered(seed: int) -> None:
    """Every leaf in one part: there and back again."""
    torch.manual_seed(seed)
    leaves = [_leaf() for _ in range(int(torch.randint(2, 9, ())))]
    where = torch.randint(0, 3, (len(leaves),)).tolist()
    parts: list[Any] = [[leaf for leaf, part in zip(leaves, where, strict=True) if part == i] for i in range(3)]
    spread = Spread(list(reversed(leaves)), parts)
    gradients = [torch.randn(2) for _ in leaves]
    back = spread.gather(spread.scatter(gradients))
    assert all(x is y for x, y in zip(back, gradients, strict=True))
