"""Headers and blocks of the transport over torch.distributed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from pipekern.errors import TransportError
from pipekern.transport import message
from pipekern.transport.wire import HEADER_BYTES, Blocks, Header, block_bytes, read_block, write_block


def test_golden_header() -> None:
    header = Header(sequence=1, tag=2, digest=2**64 - 1, descriptor_bytes=4, block_bytes=5)
    encoded = bytearray(header.encode().numpy().tobytes())
    assert len(encoded) == HEADER_BYTES == 64
    assert encoded[:8] == b"PKRN\x01\x00\x00\x00"
    assert Header.decode(encoded) == header


@pytest.mark.parametrize("at", [0, 4], ids=["magic", "version"])
def test_bytes_of_something_else_are_refused(at: int) -> None:
    encoded = bytearray(Header(0, 0, 0, 1, 1).encode().numpy().tobytes())
    encoded[at] += 1
    with pytest.raises(TransportError, match="no message header"):
        Header.decode(encoded)


def written(packed: message.Packed) -> memoryview:
    block = Blocks().take(block_bytes(packed))
    write_block(packed, block)
    return memoryview(block)


@pytest.mark.parametrize(
    "value",
    [
        None,
        torch.empty(0, 3),
        (torch.arange(5), torch.tensor(True), torch.ones(3, 7).half()),
        {"a": torch.ones(1, dtype=torch.uint8), "b": torch.randn(40).to(torch.float8_e5m2)},
    ],
    ids=["no tensor", "empty", "tuple", "dict"],
)
def test_a_block_gives_back_what_was_packed(value: Any) -> None:
    packed = message.pack(value)
    block = written(packed)
    found = message.specs(packed.descriptor)
    tensors = read_block(block, len(packed.descriptor), found)
    assert block[: len(packed.descriptor)] == packed.descriptor
    for sent, got in zip(packed.tensors, tensors, strict=True):
        assert got.dtype == sent.dtype and got.shape == sent.shape
        assert torch.equal(message.flat_bytes(got), message.flat_bytes(sent))
        assert got.data_ptr() % 64 == 0


def test_a_block_lives_as_long_as_a_view_of_any_tensor_in_it() -> None:
    packed = message.pack((torch.arange(8.0), torch.ones(3), torch.empty(0)))
    block = written(packed)
    died: list[int] = []
    watch = weakref.ref(block, lambda _: died.append(1))
    first, second, empty = read_block(block, len(packed.descriptor), message.specs(packed.descriptor))
    view = second[1:].view(2, 1)
    del block, first, second
    gc.collect()
    assert not died and view.tolist() == [[1.0], [1.0]]
    del view
    assert died and watch() is None and empty.numel() == 0


def test_blocks_are_used_again_the_smallest_that_fits() -> None:
    blocks = Blocks()
    small, large = blocks.take(100), blocks.take(10_000)
    for block in (large, small):
        blocks.give(block)
    assert blocks.take(50) is small and blocks.take(50) is large
    blocks.give(small)
    assert len(blocks.take(101)) == 101  # and the one that was too small is gone
    assert blocks.take(1) is not small
