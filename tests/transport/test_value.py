"""Walks over values see every tensor, and keep one tensor in several places one."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, deque
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipekern.transport.value import distinct, map_places, map_tensors, tensors
from tests.transport.samples import Deeper, Frozen, Hidden, Pair, Slots, State, records, same


def test_golden() -> None:
    a, b = torch.ones(1), torch.ones(2)
    value: dict[str, Any] = {"x": State(a, rest=[b, None]), "y": (Hidden(b), 3, "text")}
    doubled = value["x"].hidden  # by __post_init__
    assert [t is want for t, want in zip(tensors(value), [doubled, b, b], strict=True)] == [True] * 3
    assert [id(t) for t in distinct(tensors(value))] == [id(doubled), id(b)]
    calls: list[Tensor] = []

    def negative(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        return -tensor

    got: Any = map_tensors(negative, value)
    assert len(calls) == 2
    assert got["x"].rest[0] is got["y"][0].state
    assert got["y"][0].mask is None and got["y"][1:] == (3, "text")
    assert len([calls.pop() for _ in map_places(negative, [a, a])]) == 2


@pytest.mark.parametrize("index", range(9))
def test_records_keep_class_and_aliases(index: int) -> None:
    value = records(torch.Generator().manual_seed(3))[index]
    copy = map_tensors(lambda t: t.detach().clone().requires_grad_(t.requires_grad), value)
    assert same(value, copy)
    assert not {id(t) for t in tensors(value)} & {id(t) for t in tensors(copy)}


POOL = [torch.full((1,), float(i)) for i in range(4)]
VALUES = st.recursive(
    st.sampled_from(POOL) | st.none() | st.integers() | st.text() | st.builds(object),
    lambda part: (
        st.lists(part)
        | st.lists(part).map(tuple)
        | st.dictionaries(st.integers(), part)
        | st.builds(Pair, part, part)
        | st.builds(Frozen, part, part)
        | st.builds(Slots, part, part)
        | st.lists(part).map(deque)
        | st.dictionaries(st.text(), part).map(OrderedDict)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(VALUES)
def test_every_walk_sees_the_same_places_in_the_same_order(value: Any) -> None:
    found, others = tensors(value), list[Any]()
    assert len(tensors(value, others.append)) == len(found)
    assert all(type(other) is object for other in others)
    numbers = iter(range(len(found)))
    assert tensors(map_places(lambda _: torch.tensor(next(numbers)), value)) == list(range(len(found)))
    assert [id(t) for t in tensors(map_tensors(lambda t: t, value))] == [id(t) for t in found]
    assert type(map_places(lambda t: t, value)) is type(value)


def test_what_is_no_container_is_named_to_the_caller() -> None:
    others: list[Any] = []
    tensors([1, None, {"a": {2, 3}, "b": torch.float32}, Deeper(1, part=slice(3)), torch.Size([2])], others.append)
    assert others == [{2, 3}, torch.float32, slice(3)]


def test_nothing_keeps_the_tensors() -> None:
    gc.disable()
    try:
        tensor = torch.zeros(2)
        watch = weakref.ref(tensor)
        value = map_tensors(lambda t: t, {"a": (tensor, Frozen(tensor, 1))})
        tensors(value)
        del tensor, value
        assert watch() is None
    finally:
        gc.enable()
