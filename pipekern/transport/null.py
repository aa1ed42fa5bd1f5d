"""Moves nothing and records every call: what a test of an executor reads.

    null = NullTransport(rank=1)
    senders, receivers = null.open([Link("0>1", 0, 1, 2), Link("1>0", 1, 0, 2)])
    null.script("0>1", torch.ones(2))
    receivers["0>1"].recv(tag=7)  # the tensor just scripted
    null.calls[-1]  # Call(op="recv", link="0>1", tag=7, shapes=((2,),), dtypes=(torch.float32,))

Nothing is checked: what a test does not script does not happen.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipekern.errors import TransportError
from pipekern.transport.base import Link, Message, Receiver, Sender
from pipekern.transport.message import pack


class Call(NamedTuple):
    """One call: shapes and dtypes are those of the message's tensors, in order."""

    op: str  # open, send, full (a send that found no slot), ready, recv, held, owns, check, abort, close
    link: str = ""
    tag: int = -1
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()


class NullTransport:
    """``rank``'s view of a job whose messages go nowhere; None stands for a process that has every rank."""

    name = "null"

    def __init__(self, rank: int | None = None):
        self.rank = rank
        self.calls: list[Call] = []
        self.error: BaseException | None = None  # what check, send and recv raise, if not None
        self._scripts: dict[str, deque[Message]] = defaultdict(deque)
        self._refusals: dict[str, int] = defaultdict(int)

    def script(self, link: str, value: Any, digest: int = 0) -> None:
        """Make ``value`` the next thing that is received on ``link``."""
        self._scripts[link].append(Message(value, digest))

    def refuse(self, link: str, sends: int) -> None:
        """Make the next ``sends`` sends on ``link`` find no free slot."""
        self._refusals[link] = sends

    def open(self, links: Sequence[Link]) -> tuple[dict[str, Sender], dict[str, Receiver]]:
        """The ends of ``links`` that belong to this rank."""
        self.calls.append(Call("open"))
        outgoing = [link for link in links if self.rank in (None, link.source)]
        incoming = [link for link in links if self.rank in (None, link.target)]
        return {k.name: NullSender(self, k) for k in outgoing}, {k.name: NullReceiver(self, k) for k in incoming}

    def check(self) -> None:
        """Raises ``error`` if a test has set it."""
        self.calls.append(Call("check"))
        self.fail()

    def fail(self) -> None:
        """Raise ``error`` if it is set."""
        if self.error is not None:
            raise self.error

    def abort(self, error: BaseException, where: str) -> None:
        """Recorded; ``error`` is then raised by every other call."""
        self.calls.append(Call("abort"))
        self.error = error

    def close(self) -> None:
        """Recorded."""
        self.calls.append(Call("close"))

    def record(self, op: str, link: str, tag: int, value: Any) -> None:
        """Note a call that concerns a message."""
        tensors = pack(value).tensors
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        self.calls.append(Call(op, link, tag, shapes, tuple(tensor.dtype for tensor in tensors)))

    def refuses(self, link: str) -> bool:
        """Whether a send on ``link`` finds no slot now; counts it."""
        self._refusals[link] -= 1
        return self._refusals[link] >= 0

    def next(self, link: str) -> Message | None:
        """The next scripted message of ``link``, left in place."""
        return self._scripts[link][0] if self._scripts[link] else None

    def take(self, link: str) -> None:
        """Drop the next scripted message of ``link``."""
        self._scripts[link].popleft()


class NullSender:
    """Takes every message, or refuses as many as the test has said."""

    def __init__(self, transport: NullTransport, link: Link):
        self.link = link
        self._transport = transport

    def send(self, tag: int, value: Any, digest: int = 0, given: bool = False) -> bool:
        """Recorded as ``send``, or as ``full`` where it returns False."""
        self._transport.fail()
        full = self._transport.refuses(self.link.name)
        self._transport.record("full" if full else "send", self.link.name, tag, value)
        return not full


class NullReceiver:
    """Returns what the test has scripted."""

    def __init__(self, transport: NullTransport, link: Link):
        self.link = link
        self._transport = transport

    def ready(self) -> bool:
        """Whether something is scripted."""
        self._transport.calls.append(Call("ready", self.link.name))
        return self._transport.next(self.link.name) is not None

    def recv(self, tag: int, wait: float | None = None, into: Tensor | None = None) -> Message | None:
        """The scripted message, the very object. With none: None if ``wait`` was given, else ``TransportError``."""
        self._transport.fail()
        message = self._transport.next(self.link.name)
        self._transport.record("recv", self.link.name, tag, message and message.value)
        if message is not None:
            self._transport.take(self.link.name)
        elif wait is None:
            raise TransportError(
                f"nothing is scripted on link {self.link.name}: call script({self.link.name!r}, value)"
            )
        return message

    def held(self) -> list[tuple[int, ...]]:
        """Empty: there are no slots."""
        self._transport.calls.append(Call("held", self.link.name))
        return []

    def owns(self, pointer: int) -> bool:
        """False: there are no slots."""
        return False
