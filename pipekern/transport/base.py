"""What every transport offers: links between stages, and one view of the whole job.

A :class:`Link` is one direction between two ends, first in, first out, with a fixed number of slots. The
sending rank holds its :class:`Sender`, the receiving rank its :class:`Receiver`. A message is any nesting
of tuples, lists, dicts, named tuples and dataclasses over tensors and plain values (see ``message.py``). Sends
never wait: without a free slot ``send`` returns False and the caller tries again later. Receives wait, and every
wait ends: with the message, with the job's abort, with a peer's death, or at the deadline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Link(NamedTuple):
    """One direction between two ends.

    ``name`` is unique in a job and the same on both ranks; ``slots`` is the most messages that may be between
    arrival and last use at once, at least 1. ``codec``: what transports that cast on the way do to floating-point
    tensors of at least 128 values: "bf16" sends float32 as bfloat16, "fp8" sends them as float8_e4m3fn with a scale
    each 128 values.
    """

    name: str
    source: int
    target: int
    slots: int
    codec: str = "none"


class Message(NamedTuple):
    """What a receiver returns: the value, and the sender's batch digest (0: none)."""

    value: Any
    digest: int


class Sender(Protocol):
    """The sending end of a link."""

    link: Link

    def send(self, tag: int, value: Any, digest: int = 0, given: bool = False) -> bool:
        """Copy ``value`` into the next slot, or return False at once when no slot is free.

        Tensors may be of any device, dtype, layout and shape, and may require gradients: whether a tensor does
        is told to the receiver. ``given``: nobody changes the tensors from now on, so that a copy may be made while the
        sending stream goes on; a change that comes all the same is raised later, by this end. Raises what
        :meth:`Transport.check` raises.
        """
        ...


class Receiver(Protocol):
    """The receiving end of a link."""

    link: Link

    def ready(self) -> bool:
        """True when :meth:`recv` would not wait."""
        ...

    def recv(self, tag: int, wait: float | None = None, into: Tensor | None = None) -> Message | None:
        """The next message, whose tag must be ``tag``, else ``MessageMismatch`` with both.

        Tensors are views of the slot where the transport can do so; the slot's credit returns when the last of
        them dies. Those that required gradients at the sender are leaves that require gradients here. ``wait``
        in seconds: return None after it; None waits until the message, an abort, a death or the deadline.

        ``into``: a message of one tensor of its shape and dtype may be added to it instead, where that is one pass
        less; the value is then ``into`` itself.
        """
        ...

    def held(self) -> list[tuple[int, ...]]:
        """Shapes of received tensors whose slots are still in use (empty where slots are not shared)."""
        ...

    def owns(self, pointer: int) -> bool:
        """Whether the address lies in one of this link's slots (False where slots are not shared)."""
        ...


class Transport(Protocol):
    """One job's links, as this process sees them."""

    name: str

    def open(self, links: Sequence[Link]) -> tuple[Mapping[str, Sender], Mapping[str, Receiver]]:
        """Open ``links``, the same list on every rank; returns this process's ends, by link name. Once a job."""
        ...

    def check(self) -> None:
        """Raise ``PeerDied``, ``Aborted``, ... if the job has failed; cheap enough for every instruction."""
        ...

    def abort(self, error: BaseException, where: str) -> None:
        """Make every rank of the job raise: ``where`` names rank, stage, micro-batch and instruction."""
        ...

    def close(self) -> None:
        """Leave the job and free everything. Calling it twice is fine."""
        ...
