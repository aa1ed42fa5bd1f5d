"""Several ranks in one process and one thread: messages wait in queues, and tensors are passed by reference.

A received tensor shares memory and version counter with the one that was sent, so changing a tensor in place that
the sender's graph has saved is autograd's usual loud error; only the graphs are apart. Nothing is copied or moved to
another device. A message occupies its slot from ``send`` until the receiver has dropped the tensors it was given:
the same rule as where slots are memory, so a program that runs here has enough slots there.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pipekern.errors import ConfigError, MessageMismatch, TransportError
from pipekern.transport.base import Link, Message, Receiver, Sender
from pipekern.transport.message import Packed, check_plain, pack, unpack


class LocalTransport:
    """The links between ``ranks`` ranks of this process. It holds every end of every link."""

    name = "local"

    def __init__(self, ranks: int):
        self.ranks = ranks
        self._ends: list[LocalReceiver] = []
        self._closed = False

    def open(self, links: Sequence[Link]) -> tuple[dict[str, Sender], dict[str, Receiver]]:
        """Both ends of every link, by name. Raises ``ConfigError`` for a link to a rank that is not there."""
        for link in links:
            if not (0 <= link.source < self.ranks and 0 <= link.target < self.ranks):
                raise ConfigError(
                    f"link {link.name} goes from {link.source} to {link.target}; there are {self.ranks} ranks"
                )
        self._ends = [LocalReceiver(self, link) for link in links]
        return {end.link.name: LocalSender(end) for end in self._ends}, {end.link.name: end for end in self._ends}

    def check(self) -> None:
        """Raises only after :meth:`close`: in one thread a failure is the exception itself."""
        if self._closed:
            raise TransportError("this transport is closed")

    def abort(self, error: BaseException, where: str) -> None:
        """Forget every message and slot in use; the links can then be used again, for other data."""
        for end in self._ends:
            end.clear()

    def close(self) -> None:
        """Forget every message; nothing can be sent or received afterwards."""
        self._closed = True
        for end in self._ends:
            end.clear()


class _Queued(NamedTuple):
    tag: int
    digest: int
    packed: Packed


class LocalReceiver:
    """The receiving end, which holds the link's queue."""

    def __init__(self, transport: LocalTransport, link: Link):
        self.link = link
        self.transport = transport
        self._queue: deque[_Queued] = deque()
        self._given: list[list[weakref.ref[Tensor]]] = []  # tensors of received messages, as long as one of them lives

    def full(self) -> bool:
        """Whether every slot is in use."""
        return len(self._queue) + len(self._in_use()) >= self.link.slots

    def put(self, tag: int, digest: int, packed: Packed) -> None:
        """Queue a message."""
        self._queue.append(_Queued(tag, digest, packed))

    def _in_use(self) -> list[list[weakref.ref[Tensor]]]:
        # Looked at when a slot is wanted, so that a tensor's death costs nothing. A tensor that autograd has saved
        # counts as alive: torch keeps the Python object of a tensor that its C++ side still holds.
        self._given = [refs for refs in self._given if any(ref() is not None for ref in refs)]
        return self._given

    def ready(self) -> bool:
        """True when a message waits."""
        return bool(self._queue)

    def recv(self, tag: int, wait: float | None = None, into: Tensor | None = None) -> Message:
        """The next message. With none there it raises at once, whatever ``wait``: nobody else could send it."""
        self.transport.check()
        link = self.link
        if not self._queue:
            raise TransportError(
                f"rank {link.target} receives on link {link.name}, but rank {link.source} has not sent: in one process "
                "instructions must run in an order that is valid alone; see `pipekern schedule check`",
                link.source,
            )
        if self._queue[0].tag != tag:
            raise MessageMismatch(
                f"the message on link '{link.name}' from rank {link.source} has tag {self._queue[0].tag}, the program "
                f"expects {tag}: the two ranks run different programs",
                link.source,
            )
        message = self._queue.popleft()
        if message.packed.tensors:
            self._given.append([weakref.ref(tensor) for tensor in message.packed.tensors])
        return Message(unpack(*message.packed), message.digest)

    def held(self) -> list[tuple[int, ...]]:
        """Shapes of the received tensors that still live."""
        return [tuple(tensor.shape) for refs in self._in_use() for ref in refs if (tensor := ref()) is not None]

    def owns(self, pointer: int) -> bool:
        """False: the memory is the sender's."""
        return False

    def clear(self) -> None:
        """Forget messages and slots in use."""
        self._queue.clear()
        self._given.clear()


class LocalSender:
    """The sending end."""

    def __init__(self, receiver: LocalReceiver):
        self.link = receiver.link
        self._receiver = receiver

    def send(self, tag: int, value: Any, digest: int = 0, given: bool = False) -> bool:
        """Queue ``value`` by reference, or return False when every slot is in use."""
        self._receiver.transport.check()
        if self._receiver.full():
            return False
        self._receiver.put(tag, digest, pack(value, _alias))
        return True


def _alias(tensor: Tensor, place: str) -> Tensor:
    """The same memory and version counter under a graph of its own."""
    check_plain(tensor, place)
    return tensor.detach()
