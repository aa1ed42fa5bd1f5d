"""Batches split, joined and compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipekern.errors import ConfigError
from pipekern.runtime import microbatch
from tests.transport.samples import Frozen, Pair


def test_golden() -> None:
    """Ten samples in four parts are 3, 3, 2, 2; what has no samples goes to every part."""
    value = {"x": torch.arange(10), "scale": torch.tensor(2.0), "name": ("a", None)}
    parts = microbatch.split(value, 4, "x")
    assert [part["x"].tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    assert all(part["scale"] is value["scale"] and part["name"] == ("a", None) for part in parts)
    assert microbatch.sizes(10, 4) == [3, 3, 2, 2]
    assert microbatch.batch_size(value, "x") == 10


@given(st.integers(1, 40), st.integers(1, 40))
def test_parts_are_views_as_equal_as_possible_and_join_again(size: int, microbatches: int) -> None:
    value: Any = (torch.randn(size, 2), [torch.arange(size)], torch.ones(size, 1, 3))
    if size < microbatches:
        with pytest.raises(ConfigError, match=rf"x has {size} samples for {microbatches} .*microbatches={size}"):
            microbatch.split(value, microbatches, "x")
        return
    parts = microbatch.split(value, microbatches, "x")
    sizes = [len(part[0]) for part in parts]
    assert sizes == microbatch.sizes(size, microbatches)
    assert sum(sizes) == size
    assert max(sizes) - min(sizes) <= 1
    memory = value[0].untyped_storage().data_ptr()
    assert all(part[0].untyped_storage().data_ptr() == memory for part in parts)
    joined = microbatch.join(parts)
    assert type(joined[1]) is list
    assert all(torch.equal(joined[i], value[i]) for i in (0, 2))
    assert torch.equal(joined[1][0], value[1][0])


def test_join_stacks_what_has_no_dimensions_and_keeps_plain_values() -> None:
    parts = [{"loss": torch.tensor(float(i)), "name": "a", "none": None} for i in range(3)]
    joined = microbatch.join(parts)
    assert joined["loss"].tolist() == [0.0, 1.0, 2.0]
    assert (joined["name"], joined["none"]) == ("a", None)


def test_records_are_split_and_joined_and_aliases_stay() -> None:
    x = torch.arange(6.0)
    parts = microbatch.split(Frozen(x, Pair([x, 3], torch.tensor(2))), 4, "x")
    assert [part.left.tolist() for part in parts] == [[0, 1], [2, 3], [4], [5]]
    assert all(part.left is part.right.left[0] and type(part.right) is Pair for part in parts)
    joined = microbatch.join(parts)
    assert torch.equal(joined.left, x) and torch.equal(joined.right.left[0], x) and joined.right.right.shape == (4,)


def test_outputs_may_be_one_tensor_in_some_micro_batches_alone() -> None:
    """As ``x.contiguous()`` is ``x`` where it is contiguous."""
    a, b, c = torch.ones(1), torch.zeros(2), torch.full((2,), 2.0)
    first, second = microbatch.join([(a, a), (b, c)])
    assert (first.tolist(), second.tolist()) == ([1, 0, 0], [1, 2, 2])


def test_objects_are_joined_only_if_they_are_the_same() -> None:
    dtype = torch.float32
    assert microbatch.join([{"dtype": dtype, "x": torch.ones(1)}] * 2)["dtype"] is dtype
    with pytest.raises(ConfigError, match=r"builtins\.set a micro-batch, which cannot be joined"):
        microbatch.join([({1}, torch.ones(1)), ({1}, torch.ones(1))])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((torch.ones(3), torch.ones(4)), "3 and 4 samples"),
        ({"a": 1, "b": "text"}, "no tensor with a batch dimension"),
        (torch.tensor(1.0), "no tensor with a batch dimension"),
        ((), "no tensor with a batch dimension"),
    ],
    ids=["two sizes", "no tensor", "0-d", "empty"],
)
def test_batches_without_one_size(value: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^x has .*{text}"):
        microbatch.batch_size(value, "x")


def test_digest_is_of_values_shapes_and_dtypes_not_of_layout() -> None:
    """Equal batches have equal digests, and nothing else does."""
    x = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    assert microbatch.digest(x, None) == microbatch.digest(x.t().contiguous().t(), None)
    flipped = x.clone()
    flipped[2, 3] ^= 1
    others: list[Any] = [
        (x, None), (flipped, None), (x.reshape(4, 3), None), (x.long(), None), (x, x), (x[:2], None), (x[:0], None),
        ({"a": x, "b": x[:1]}, None), (x.to(torch.float32), None), (torch.cat([x, x]), None),
    ]  # fmt: skip
    digests = [microbatch.digest(*other) for other in others]
    assert len(set(digests)) == len(others)
    assert all(0 < digest < 2**63 for digest in digests)


@given(st.integers(1, 5000), st.integers(0, 2**31))
def test_one_flipped_bit_changes_the_digest(size: int, place: int) -> None:
    x = torch.zeros(size, dtype=torch.uint8)
    y = x.clone()
    y[place % size] = 1 << (place % 8)
    assert microbatch.digest(x) != microbatch.digest(y)


def test_on_the_cpu_nothing_is_moved() -> None:
    value = {"x": torch.ones(2, requires_grad=True)}
    assert microbatch.to_device(value, torch.device("cpu")) is value
