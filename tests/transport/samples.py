"""Records that travel in tests, and when two values are the same."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from pipekern.transport import message
from pipekern.transport.value import tensors

T = TypeVar("T")
Pair = namedtuple("Pair", "left right")


class Hidden(NamedTuple):
    """A named tuple with types, a default and a property."""

    state: Tensor
    mask: Tensor | None = None

    @property
    def width(self) -> int:
        return self.state.shape[-1]


@dataclass
class State:
    """An ordinary dataclass, whose ``__post_init__`` must not run again on the way."""

    hidden: Any
    rest: Any = None
    doubled: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.hidden = self.hidden * 2

    @cached_property
    def total(self) -> Tensor:
        return self.hidden.sum()


@dataclass(frozen=True)
class Frozen(Generic[T]):
    left: T
    right: T


@dataclass(slots=True)
class Slots:
    first: Any
    second: Any


@dataclass
class Deeper(State):
    """Inherits fields, and is called by a path."""

    @dataclass(kw_only=True)
    class Part:
        weight: Any

    part: Any = None


def same(left: Any, right: Any) -> bool:
    """Equal in type, structure, every bit, and in which tensors are one object."""
    return _equal(left, right) and _aliases(left) == _aliases(right)


def _equal(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        alike = (left.dtype, left.shape, left.requires_grad) == (right.dtype, right.shape, right.requires_grad)
        return alike and torch.equal(*(message.flat_bytes(message.plain(t)) for t in (left, right)))
    if dataclasses.is_dataclass(left):
        return all(_equal(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left))
    if isinstance(left, dict):
        return list(left) == list(right) and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(_equal, left, right))
    return repr(left) == repr(right)  # nan equals itself, 0.0 differs from -0.0


def _aliases(value: Any) -> list[int]:
    """For each place of a tensor the first place where that very object stands."""
    found = [id(tensor) for tensor in tensors(value)]
    return [found.index(identity) for identity in found]


def records(g: torch.Generator) -> list[Any]:
    """One value of every kind of record, nested, some with one tensor in several places."""
    matrix = torch.randn(6, 8, generator=g)
    leaf = matrix.clone().requires_grad_()
    return [
        Pair(matrix.clone(), None),
        Hidden(matrix.clone().requires_grad_()),
        State(matrix, Pair(1, [2.5, "x"])),
        Frozen(leaf, (leaf, {"again": leaf})),
        Slots(Frozen(1, 2), Hidden(matrix.T, matrix > 0)),
        Deeper(matrix, part=Deeper.Part(weight=matrix.double())),
        [leaf, matrix, leaf, (matrix, leaf)],
        [matrix[:3], matrix[:3], matrix],  # views of one memory are tensors of their own
        (matrix.T, matrix[:, ::2], {"a": State(leaf, leaf)}),
    ]
