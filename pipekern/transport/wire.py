"""A message as bytes over a process group of two ranks: a header of 64 bytes, then one block.

The block holds the descriptor and then the tensors, each at a multiple of 64 bytes.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from pipekern.errors import TransportError
from pipekern.transport.message import Packed, TensorSpec, flat_bytes

MESSAGES, TOKENS, NOTHING = 0, 1, 2  # tags: the messages, the credits that come back, and one that nothing is sent on
_HEADER = struct.Struct("<4sI5Q16x")
_MAGIC, _VERSION = b"PKRN", 1
_ALIGNMENT = 64
_FOREVER = timedelta(days=3650)


class Header(NamedTuple):
    """What comes before a block. ``sequence`` counts a link's messages from 0; no block: the sender has closed."""

    sequence: int
    tag: int
    digest: int
    descriptor_bytes: int
    block_bytes: int

    def encode(self) -> Tensor:
        """As uint8 of shape ``(64,)``."""
        return torch.frombuffer(bytearray(_HEADER.pack(_MAGIC, _VERSION, *self)), dtype=torch.uint8)

    @classmethod
    def decode(cls, memory: bytearray) -> Header:
        """Read 64 bytes; raises ``TransportError`` for bytes of something else."""
        magic, version, *fields = _HEADER.unpack(memory)
        if (magic, version) != (_MAGIC, _VERSION):
            raise TransportError(f"{magic!r} version {version} is no message header; expected {_MAGIC!r} {_VERSION}")
        return cls(*fields)


HEADER_BYTES = _HEADER.size


class Blocks:
    """Memory for a link's messages, used again: fresh pages cost more than the copy into them (64 MB: 25 ms).

    One thread takes; any may give, also one that just dropped a tensor.
    """

    def __init__(self) -> None:
        self._spare: list[mmap.mmap] = []

    def take(self, nbytes: int) -> mmap.mmap:
        """A block of at least ``nbytes``; in place of a spare one that is too small, new memory."""
        fitting = [block for block in list(self._spare) if len(block) >= nbytes]
        if fitting:
            best = min(fitting, key=len)
            self._spare.remove(best)
            return best
        if self._spare:
            self._spare.pop(0)
        return mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def give(self, block: mmap.mmap) -> None:
        """Take ``block`` back."""
        self._spare.append(block)


def block_bytes(packed: Packed) -> int:
    """How much a message takes."""
    return _offsets(len(packed.descriptor), [tensor.nbytes for tensor in packed.tensors])[-1]


def write_block(packed: Packed, block: mmap.mmap) -> None:
    """Fill a block: the one copy that a send makes."""
    sizes = [tensor.nbytes for tensor in packed.tensors]
    block[: len(packed.descriptor)] = packed.descriptor
    for tensor, offset, size in zip(packed.tensors, _offsets(len(packed.descriptor), sizes), sizes, strict=False):
        if size:
            torch.frombuffer(block, dtype=torch.uint8, count=size, offset=offset).copy_(flat_bytes(tensor))


def read_block(block: memoryview, descriptor_bytes: int, found: Sequence[TensorSpec]) -> list[Tensor]:
    """The tensors ``found`` in ``block``, each with a storage of its own that holds ``block``; empty ones do not."""
    offsets = _offsets(descriptor_bytes, [spec.nbytes for spec in found])
    tensors = []
    for spec, offset in zip(found, offsets, strict=False):
        if spec.nbytes:
            flat = torch.frombuffer(block, dtype=torch.uint8, count=spec.nbytes, offset=offset)
            tensors.append(flat.view(spec.dtype).view(spec.shape))
        else:
            tensors.append(torch.empty(spec.shape, dtype=spec.dtype))
    return tensors


def _offsets(start: int, sizes: Sequence[int]) -> list[int]:
    """Where each part starts, and last where the block ends."""
    offsets = []
    for size in sizes:
        start = -(-start // _ALIGNMENT) * _ALIGNMENT
        offsets.append(start)
        start += size
    return [*offsets, start]


class Wire:
    """The two-rank group of one link, as one of the two sees it. A lost connection raises ``RuntimeError``."""

    def __init__(self, group: ProcessGroup):
        self._group = group
        self._peer = 1 - group.rank()

    def send(self, data: Tensor, tag: int) -> Work:
        """Start to send; never waits. The caller keeps ``data`` and the work until the peer has it."""
        return self._group.send([data], self._peer, tag)

    def recv(self, data: Tensor, tag: int) -> None:
        """Wait, without the GIL, until ``data`` is filled; :meth:`snap` is what ends it early."""
        self._group.recv([data], self._peer, tag).wait(_FOREVER)

    def snap(self) -> None:
        """Break the connection, which wakes every thread that waits on it.

        gloo offers nothing else that does (seen in torch 2.13: abort, shutdown and destroying the group leave a
        waiting thread asleep): a wait that times out closes the group's connections.
        """
        with suppress(RuntimeError):
            self._group.recv([torch.empty(1)], self._peer, NOTHING).wait(timedelta(milliseconds=1))
