"""Links through shared memory, between processes of one host.

The sender copies a message once, into a slot of memory that both processes map; the receiver computes on a view
of the slot, and the slot is free again when the last such view dies. Everything that waits, watches or touches
shared memory is in C++ (``csrc/transport``); here values become headers and bytes.
"""

from __future__ import annotations

import atexit
import functools
import sys
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pipekern import _C
from pipekern.transport import message
from pipekern.transport.base import Link, Message
from pipekern.transport.message import DTYPE_CODE

_ALIGN = 64  # of every tensor in a bundle
_TEXT_BYTES = 8000  # of a failure, with its traceback, on the job's page


class ShmSender:
    """The sending end of a link."""

    def __init__(self, link: Link, end: _C.Sender):
        self.link = link
        self.end = end
        self._send_tensor = end.send_tensor

    def send(self, tag: int, value: Any, digest: int = 0, given: bool = False) -> bool:
        """See :meth:`pipekern.transport.base.Sender.send`."""
        if type(value) is Tensor or isinstance(value, Tensor):  # the second test takes 0.1 µs
            sent = self._send_tensor(tag, value, value.requires_grad, digest)
            if sent is not None:
                return sent
        if not self.end.free(tag):  # looked at first: a copy that cannot be sent is for nothing
            return False
        if isinstance(value, Tensor):
            sent = self._send_tensor(tag, message.plain(value), value.requires_grad, digest)
            if sent is not None:
                return sent
        descriptor, tensors = message.pack(value)
        return self.end.send_bundle(tag, descriptor, [(part.data_ptr(), part.nbytes) for part in tensors], digest)


class ShmReceiver:
    """The receiving end of a link."""

    def __init__(
        self,
        link: Link,
        end: _C.Receiver | _C.StagedReceiver,
        recv: Callable[[int, float], Message | tuple[_C.Arrival, bytes, int] | None],
    ):
        """``recv``: that of ``end``."""
        self.link = link
        self.end = end
        self._recv = recv

    def ready(self) -> bool:
        """See :meth:`pipekern.transport.base.Receiver.ready`."""
        return self.end.ready()

    def recv(self, tag: int, wait: float | None = None, into: Tensor | None = None) -> Message | None:
        """See :meth:`pipekern.transport.base.Receiver.recv`."""
        arrived = self._recv(tag, -1.0 if wait is None else max(wait, 0.0))
        if arrived is None or isinstance(arrived, Message):
            return arrived
        arrival, descriptor, digest = arrived
        return Message(_unbundle(arrival, descriptor), digest)

    def held(self) -> list[tuple[int, ...]]:
        """See :meth:`pipekern.transport.base.Receiver.held`; of a bundle, all shapes until its last tensor is gone."""
        shapes: list[tuple[int, ...]] = []
        for item in self.end.held():
            shapes += [spec.shape for spec in message.specs(item)] if isinstance(item, bytes) else [item]
        return shapes

    def owns(self, pointer: int) -> bool:
        """See :meth:`pipekern.transport.base.Receiver.owns`."""
        return self.end.owns(pointer)


def shm_sender(job: _C.Job, number: int, link: Link) -> ShmSender:
    """The sending end of the job's link ``number``."""
    return ShmSender(link, _C.Sender(job, number, link.name, link.target, link.slots))


def shm_receiver(job: _C.Job, number: int, link: Link) -> ShmReceiver:
    """Its receiving end; waits for the other."""
    end = _C.Receiver(job, number, link.name, link.source, link.slots)
    return ShmReceiver(link, end, end.recv)


class ShmTransport:
    """This process's part of a job among processes of one host and one user."""

    name = "shm"

    def __init__(self, rank: int, world: int, token: str, timeout: float, barrier: Callable[[], object]):
        """Join; returns when all ``world`` ranks have.

        ``token`` is the same on all ranks and of no other job (16 random bytes in hex). ``timeout`` in seconds
        bounds a peer's silence, and all ranks' waiting at once. ``barrier`` returns once every rank has called it.
        Raises ``TransportError``.
        """
        self._job = _C.Job(rank, world, token, timeout)
        barrier()  # every rank listens now
        self._job.connect()
        self._rank = rank
        # A program that ends in order leaves the job in order, one that ends by an exception tells which.
        self._leave = functools.partial(leave, weakref.ref(self))
        atexit.register(self._leave)

    def open(self, links: Sequence[Link]) -> tuple[dict[str, ShmSender], dict[str, ShmReceiver]]:
        """See :meth:`pipekern.transport.base.Transport.open`."""
        numbered = list(enumerate(links))
        senders = {
            link.name: shm_sender(self._job, number, link) for number, link in numbered if link.source == self._rank
        }
        receivers = {
            link.name: shm_receiver(self._job, number, link) for number, link in numbered if link.target == self._rank
        }
        return senders, receivers

    def check(self) -> None:
        """See :meth:`pipekern.transport.base.Transport.check`."""
        self._job.check()

    def abort(self, error: BaseException, where: str) -> None:
        """See :meth:`pipekern.transport.base.Transport.abort`."""
        self._job.abort(failure_text(error, f"rank {self._rank} failed, in {where}:\n"))

    def close(self) -> None:
        """See :meth:`pipekern.transport.base.Transport.close`."""
        atexit.unregister(self._leave)
        self._job.close()


def failure_text(error: BaseException, head: str) -> str:
    """``head`` and the traceback of ``error``, as much of its end as a job's page holds."""
    trace = "".join(traceback.format_exception(error)).encode(errors="replace")
    return head + trace[-(_TEXT_BYTES - len(head.encode())) :].decode(errors="replace")  # the error stands at the end


def leave(reference: weakref.ref[Any]) -> None:
    """At the interpreter's exit: what ended the program, if it was an exception, is every rank's failure."""
    transport = reference()
    if transport is None:
        return
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if error is not None:
        transport.abort(error, "the program, outside of the pipeline")
    transport.close()


def _unbundle(arrival: _C.Arrival, descriptor: bytes) -> Any:
    offset = aligned(len(descriptor))

    def tensor_of(spec: message.TensorSpec) -> Tensor:
        nonlocal offset
        tensor = arrival.view(offset, DTYPE_CODE[spec.dtype], spec.shape)
        offset = aligned(offset + spec.nbytes)
        return tensor

    return message.assemble(descriptor, tensor_of)


def aligned(offset: int) -> int:
    """The next place in a payload where a tensor may begin."""
    return -(-offset // _ALIGN) * _ALIGN
