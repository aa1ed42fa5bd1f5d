"""The two ends of a link over a process group: each reads, in a thread, what the other sends.

A link ends with three steps, each answering the one before, so that no side breaks the connection early: the receiver
asks (only if it closes first), the sender ends its messages, the receiver ends its tokens.
"""

from __future__ import annotations

import mmap
import queue
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import Work

from pipekern.errors import MessageMismatch, PeerDied, TransportError
from pipekern.transport.agree import SLICE
from pipekern.transport.base import Link, Message
from pipekern.transport.control import Control
from pipekern.transport.message import pack, specs, unpack
from pipekern.transport.wire import (
    HEADER_BYTES,
    MESSAGES,
    TOKENS,
    Blocks,
    Header,
    Wire,
    block_bytes,
    read_block,
    write_block,
)

CREDIT, END, PLEASE_END = 1, -1, -2  # tokens, int64: one slot is free; the last token; the receiver closes


class DistSender:
    """The sending end."""

    def __init__(self, control: Control, link: Link, wire: Wire):
        self.link, self.wire = link, wire
        self.thread = threading.Thread(target=self._read_tokens, name=f"pipekern {link.name}", daemon=True)
        self._control = control
        self._lock = threading.Lock()
        self._sequence = 0
        self._free = link.slots
        self._ended = False
        self._blocks = Blocks()
        self._posted: deque[_Posted] = deque()  # what the peer may still be reading

    def send(self, tag: int, value: Any, digest: int = 0, given: bool = False) -> bool:
        """Copy ``value`` and start to send it, or return False when ``slots`` messages are not yet given back."""
        self._control.check()
        if self._free == 0:
            self._control.blocked(f"a free slot on link '{self.link.name}' to rank {self.link.target}")
            return False
        packed = pack(value)
        nbytes = block_bytes(packed)
        block = self._blocks.take(nbytes)
        write_block(packed, block)
        header = Header(self._sequence, tag, digest, len(packed.descriptor), nbytes).encode()
        with self._lock:
            if self._ended:
                raise _closed(self.link.target, f"rank {self.link.source} sends on link '{self.link.name}'")
            self._free -= 1
            self._post([header, torch.frombuffer(block, dtype=torch.uint8, count=nbytes)], block)
        self._sequence += 1
        self._control.moved()
        return True

    def _post(self, parts: list[Tensor], block: mmap.mmap | None = None) -> None:
        try:
            self._posted.append(_Posted([self.wire.send(part, MESSAGES) for part in parts], parts, block))
        except RuntimeError as error:
            self._control.lost(self.link.target, _brief(error))
            self._control.check()
            raise

    def finish(self) -> None:
        """Say that no more messages come; the peer answers with its last token."""
        with self._lock:
            if not self._ended:
                self._ended = True
                with suppress(RuntimeError):  # the thread sees the loss too, and judges it
                    self._post([Header(self._sequence, 0, 0, 0, 0).encode()])

    def _read_tokens(self) -> None:
        token = torch.zeros(1, dtype=torch.int64)
        try:
            while True:
                self.wire.recv(token, TOKENS)
                if token.item() == END:
                    return
                if token.item() == PLEASE_END:
                    self.finish()
                    continue
                self._release()
        except RuntimeError as error:
            self._ended = True
            self._control.lost(self.link.target, _brief(error))

    def _release(self) -> None:
        """Take back the oldest message's memory and slot."""
        with self._lock:  # so that the message is in the queue, however fast its token came back
            posted = self._posted.popleft()
        for work in posted.works:
            work.wait()  # at once: the peer has the message
        if posted.block is not None:
            self._blocks.give(posted.block)
        with self._lock:
            self._free += 1


class _Posted(NamedTuple):
    works: list[Work]
    parts: list[Tensor]
    block: mmap.mmap | None


class _Arrived(NamedTuple):
    header: Header
    block: mmap.mmap


class _Lent(NamedTuple):
    """A received block that tensors still view."""

    watch: weakref.ref[memoryview]
    block: mmap.mmap
    start: int
    stop: int
    shapes: list[tuple[int, ...]]


class DistReceiver:
    """The receiving end."""

    def __init__(self, control: Control, link: Link, wire: Wire, freed: queue.SimpleQueue[DistReceiver | None]):
        self.link, self.wire = link, wire
        self.thread = threading.Thread(target=self._read_messages, name=f"pipekern {link.name}", daemon=True)
        self._control = control
        self._what = f"link '{link.name}' from rank {link.source}"
        self._lock = threading.Lock()
        self._ended = False
        self._tokens: deque[tuple[Work, Tensor]] = deque(maxlen=link.slots + 2)  # older ones have been read: see post
        self._arrived: queue.SimpleQueue[_Arrived | None] = queue.SimpleQueue()
        self._freed = freed
        self._blocks = Blocks()
        self._lent: dict[int, _Lent] = {}  # by the id of its watch, since a memoryview has no hash

    def ready(self) -> bool:
        """True when a message has arrived, or none can come."""
        return not self._arrived.empty()

    def recv(self, tag: int, wait: float | None = None, into: Tensor | None = None) -> Message | None:
        """See :meth:`pipekern.transport.base.Receiver.recv`."""
        arrived = self._next(wait)
        if arrived is None:
            return None
        header, block = arrived
        if header.tag != tag:
            raise MessageMismatch(
                f"the message on {self._what} has tag {header.tag}, the program expects {tag}: the two ranks run "
                "different programs",
                self.link.source,
            )
        lease = memoryview(block)  # what the tensors hold: it dies with the last of them, and the block is used again
        descriptor = block[: header.descriptor_bytes]
        found = specs(descriptor)
        tensors = read_block(lease, header.descriptor_bytes, found)
        start = torch.frombuffer(block, dtype=torch.uint8).data_ptr()
        shapes = [spec.shape for spec in found if spec.nbytes]
        watch = weakref.ref(lease, self._died)
        self._lent[id(watch)] = _Lent(watch, block, start, start + len(block), shapes)
        return Message(unpack(descriptor, tensors), header.digest)

    def _next(self, wait: float | None) -> _Arrived | None:
        """The next message, or None after ``wait`` seconds; looks at the job each slice."""
        deadline = None if wait is None else time.monotonic() + wait
        while True:
            self._control.check()
            left = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
            try:
                arrived = self._arrived.get(timeout=left) if left > 0 else self._arrived.get_nowait()
            except queue.Empty:
                self._control.blocked(self._what)
                if deadline is not None and time.monotonic() >= deadline:
                    return None
                continue
            self._control.check()  # after an abort nothing is returned
            if arrived is not None:
                self._control.moved()
                return arrived
            self._arrived.put(None)
            raise _closed(self.link.source, f"rank {self.link.target} waits for {self._what}")

    def _died(self, watch: weakref.ref[memoryview]) -> None:
        self._blocks.give(self._lent.pop(id(watch)).block)
        self._freed.put(self)

    def held(self) -> list[tuple[int, ...]]:
        """Shapes of received tensors in blocks that something still views."""
        return [shape for lent in list(self._lent.values()) for shape in lent.shapes]

    def owns(self, pointer: int) -> bool:
        """Whether the address lies in a received block."""
        return any(lent.start <= pointer < lent.stop for lent in list(self._lent.values()))

    def post(self, token: int) -> Work | None:
        """Send ``token``, unless the last one has been sent. The peer reads one before it may cause another."""
        with self._lock, suppress(RuntimeError):  # the reading thread sees a loss too, and judges it
            if not self._ended:
                self._ended = token == END
                data = torch.tensor([token])
                self._tokens.append((self.wire.send(data, TOKENS), data))
                return self._tokens[-1][0]
        return None

    def finish(self) -> None:
        """Ask the peer to end its messages."""
        self.post(PLEASE_END)

    def _read_messages(self) -> None:
        try:
            while True:
                memory = bytearray(HEADER_BYTES)
                self.wire.recv(torch.frombuffer(memory, dtype=torch.uint8), MESSAGES)
                header = Header.decode(memory)
                if header.block_bytes == 0:
                    last = self.post(END)
                    if last is not None:
                        last.wait()
                    return
                block = self._blocks.take(header.block_bytes)
                self.wire.recv(torch.frombuffer(block, dtype=torch.uint8, count=header.block_bytes), MESSAGES)
                self._arrived.put(_Arrived(header, block))
        except RuntimeError as error:
            self._control.lost(self.link.source, _brief(error))
        except TransportError as error:
            self._control.abort(error, f"rank {self.link.target}, {self._what}")
        finally:
            self._arrived.put(None)


def _closed(rank: int, what: str) -> PeerDied:
    text = f"rank {rank} has closed its pipeline, and {what}; every rank must take the same number of steps before"
    return PeerDied(f"{text} it closes", rank)


def _brief(error: RuntimeError) -> str:
    """gloo's own text, without its advice."""
    return f"the connection to it is lost ({str(error).partition('. This is typically')[0]})"
