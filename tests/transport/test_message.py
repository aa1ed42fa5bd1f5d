"""Values between stages: taken apart, put together, or refused by name."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipekern.errors import ConfigError, TransportError
from pipekern.transport import message
from tests.transport.samples import Frozen, Pair, Slots, State, records, same


def there_and_back(value: Any) -> Any:
    descriptor, tensors = message.pack(value)
    arrived = []
    for spec, tensor in zip(message.specs(descriptor), tensors, strict=True):
        assert spec.nbytes == tensor.numel() * tensor.element_size()
        arrived.append(message.flat_bytes(tensor).clone().view(spec.dtype).view(spec.shape))
    return message.unpack(descriptor, arrived)


def test_golden() -> None:
    hidden = torch.arange(6.0).reshape(2, 3).requires_grad_()
    value: dict[str, Any] = {"hidden": hidden, "mask": (torch.tensor([True, False]), None), "step": 3}
    descriptor, tensors = message.pack(value)
    assert json.loads(descriptor) == {
        "tensors": [[10, [2, 3], True], [15, [2], False]],
        "value": ["dict", {"hidden": ["tensor", 0], "mask": ["tuple", [["tensor", 1], None]], "step": 3}],
    }
    assert [t.data_ptr() for t in tensors] == [hidden.data_ptr(), value["mask"][0].data_ptr()]
    back = there_and_back(value)
    assert same(value, back)
    assert back["hidden"].is_leaf and back["hidden"].requires_grad


@pytest.mark.parametrize("dtype", message.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (1, 2, 1, 2, 3, 1)], ids=str)
def test_every_dtype_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel()
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype).view(shape)
    assert same((tensor,), there_and_back((tensor,)))


def test_layouts_arrive_contiguous_with_the_same_values() -> None:
    base = torch.randn(4, 6, 8, dtype=torch.complex64)
    for view in (base.transpose(0, 2), base[:, ::2, 1:], base[0, 0, :1].expand(3, 1), base.conj(), base.conj().imag):
        back = there_and_back(view)
        assert torch.equal(view, back) and back.is_contiguous() and not back.is_conj() and not back.is_neg()
    parameter = torch.nn.Parameter(torch.randn(3))
    assert there_and_back(parameter).requires_grad


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.builds(torch.Size, st.lists(st.integers(0, 9), max_size=3))
    | st.builds(torch.rand, st.lists(st.integers(0, 3), max_size=5))
)
VALUES = st.recursive(
    LEAVES,
    lambda part: (
        st.lists(part)
        | st.lists(part).map(tuple)
        | st.dictionaries(st.text(), part)
        | st.builds(Pair, part, part)
        | st.builds(Frozen, part, part)
        | st.builds(Slots, part, part)
        | part.map(lambda item: [item, (item,)])  # the same tensors twice
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(VALUES)
def test_any_nesting_comes_back(value: Any) -> None:
    assert same(value, there_and_back(value))


@pytest.mark.parametrize("index", range(9))
def test_records_and_aliases_come_back(index: int) -> None:
    value = records(torch.Generator().manual_seed(4))[index]
    assert same(value, there_and_back(value))


def test_a_record_is_named_and_a_tensor_in_two_places_is_sent_once() -> None:
    tensor = torch.ones(2)
    descriptor, sent = message.pack(Frozen(tensor, Pair(tensor, 1)))
    assert [t.data_ptr() for t in sent] == [tensor.data_ptr()]
    inner = ["record", "tests.transport.samples:Pair", {"left": ["tensor", 0], "right": 1}]
    assert json.loads(descriptor) == {
        "tensors": [[10, [2], False]],
        "value": ["record", "tests.transport.samples:Frozen", {"left": ["tensor", 0], "right": inner}],
    }


def _local() -> Any:
    @dataclass
    class Local:
        size: int

    return Local(1)


class Wrapped(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ((1, {"a": {1, 2}}), ["the value[1]['a']", "builtins.set"]),
        (OrderedDict(a=1), ["OrderedDict"]),
        (State(1, rest=Frozen(2, {3})), ["the value.rest.right", "builtins.set"]),
        (_local(), ["Local", "top level"]),
        (torch.ones(2, 2).max(0), ["torch.return_types.max"]),
        ({1: 2}, ["key 1", "rename"]),
        ([torch.float32], ["torch.dtype"]),
        (torch.rand(2).as_subclass(Wrapped), ["Wrapped", "as_subclass"]),
        (torch.eye(2).to_sparse(), ["sparse_coo", "to_dense"]),
        (torch.empty(2, device="meta"), ["meta"]),
        (object(), ["builtins.object"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_travel_is_named(value: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        message.pack(value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_nothing_keeps_the_tensors() -> None:
    """A slot is free when its tensors die: by their count of references, not when the collector comes by."""
    gc.disable()
    try:
        sent = torch.zeros(2)
        descriptor, arrived = message.pack({"a": (sent, 1)})
        watched = [weakref.ref(sent), weakref.ref(arrived[0])]
        value = message.unpack(descriptor, arrived)
        del sent, arrived, value
        assert [reference() for reference in watched] == [None, None]
    finally:
        gc.enable()


def test_damage_is_noticed() -> None:
    descriptor, tensors = message.pack((torch.zeros(2), torch.zeros(3)))
    with pytest.raises(TransportError, match="damaged"):
        message.specs(descriptor[:-1])
    with pytest.raises(TransportError, match="announces"):
        message.unpack(descriptor, tensors[::-1])
    with pytest.raises(TransportError, match="announces"):
        message.unpack(descriptor, tensors[:1])


@pytest.mark.parametrize(
    ("name", "parts", "words"),
    [
        ("os:system", {"command": "true"}, ["os:system", "import os"]),
        ("subprocess:Popen", {"args": "true"}, ["subprocess:Popen"]),
        ("antigravity:Comic", {}, ["antigravity"]),
        ("tests.transport.samples:Pair", {"left": 1}, ["['left']", "['left', 'right']", "same code"]),
        ("tests.transport.samples:State", {"hidden": 1, "__class__": 2}, ["__class__", "same code"]),
    ],
)
def test_only_known_records_with_their_own_fields_are_made(name: str, parts: dict[str, Any], words: list[str]) -> None:
    """Whatever a message says: nothing is imported and nothing is called."""
    descriptor = json.dumps({"tensors": [], "value": ["record", name, parts]}).encode()
    with pytest.raises(TransportError) as caught:
        message.unpack(descriptor, [])
    assert all(word in str(caught.value) for word in words), caught.value
    assert "antigravity" not in sys.modules
