"""Links between CUDA devices of one host: between processes, or between the ranks of one process.

A put is queued in the sending stream's order on a copy stream of the link, straight into a slot in the receiver's
memory; the receiving stream waits for it on the device, and the slot is free again after what that stream had queued
when the last view died. No call waits for a device. Unless a tensor is given away, the sending stream's later work
begins when it has been read. Everything else of a message (its descriptor, tensors of the CPU) goes through shared host
memory, as in ``shm.py``. The work is in C++ (``csrc/cuda``).

Tensors that a link's codec casts, and those that go through host memory, land in memory of the receiver's device first.
What a stage does with a received tensor on streams of its own must be joined, before the tensor dies, into the stream
that was current when it was received: the rule of torch's allocator for tensors without ``record_stream``. A tensor
that is sent is held until it has been read, so it needs none.
"""

from __future__ import annotations

import atexit
import functools
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipekern import _C
from pipekern.errors import TransportError
from pipekern.transport import message, nvrtc
from pipekern.transport.base import Link, Message
from pipekern.transport.bundle import split, unbundle
from pipekern.transport.shm import failure_text, leave

_CODECS = {"none": _C.Codec.NONE, "bf16": _C.Codec.BF16, "fp8": _C.Codec.FP8}
_DLPACK = {"cpu": 1, "cuda": 2}  # DLDeviceType


class _Sent(NamedTuple):
    """Tensors of one message but those in received slots, and their versions where nobody may change them."""

    tensors: list[Tensor]
    versions: list[int] | None


class CudaSender:
    """The sending end of a link from ``device``; ``receivers`` are all receiving ends of this process."""

    def __init__(self, link: Link, end: _C.DeviceSender, device: torch.device, receivers: Mapping[str, CudaReceiver]):
        self.link = link
        self.end = end
        self.device = device
        self._receivers = receivers
        self._sent: deque[_Sent] = deque()  # not known to have been read
        self._read = 0

    def send(self, tag: int, value: Any, digest: int = 0, given: bool = False) -> bool:
        """See :meth:`pipekern.transport.base.Sender.send`; the tensors are of the current stream."""
        self.reap()
        if isinstance(value, Tensor) and value.device == self.device:
            sent = self._send_tensor(tag, value, value.requires_grad, digest, given)
            if sent is not None:
                return sent
        if not self.end.free(tag):  # looked at first: a copy that cannot be sent is for nothing
            return False
        if isinstance(value, Tensor) and value.device.type == self.device.type:
            sent = self._send_tensor(tag, self._plain(value), value.requires_grad, digest, given)
            if sent is not None:
                return sent
        descriptor, tensors = message.pack(value, self._plain)
        places = bytes(tensor.device == self.device for tensor in tensors)
        on_host = [(tensor.data_ptr(), tensor.nbytes) for tensor, here in zip(tensors, places, strict=True) if not here]
        on_device = [tensor for tensor, here in zip(tensors, places, strict=True) if here]
        own, given = self._own(on_device, given)
        stream = current_stream(self.device)
        sent = self.end.send_bundle(tag, descriptor + places, on_host, on_device, digest, stream, given)
        if sent and on_device:
            self._keep(own, given)
        return sent

    def _send_tensor(self, tag: int, tensor: Tensor, requires_grad: bool, digest: int, given: bool) -> bool | None:
        own, given = self._own([tensor], given)
        sent = self.end.send_tensor(tag, tensor, requires_grad, digest, current_stream(self.device), given)
        if sent:
            self._keep(own, given)
        return sent

    def _own(self, tensors: list[Tensor], given: bool) -> tuple[list[Tensor], bool]:
        """Those outside of received slots, and whether all are given. One that is sent on out of its slot must not be
        held, or its sender may wait for the slot while this rank waits for its sender: later work waits for the read.
        """
        ends, full = self._receivers.values(), [tensor for tensor in tensors if tensor.numel()]
        own = [tensor for tensor in full if not any(end.owns(message.address(tensor)) for end in ends)]
        counted = not any(tensor.is_inference() for tensor in own)  # which count no versions
        return own, given and counted and len(own) == len(full)

    def _keep(self, tensors: list[Tensor], given: bool) -> None:
        # Without their graphs, at whose other ends may be what this stage has received, and so slots.
        kept = [tensor.detach() for tensor in tensors]
        self._sent.append(_Sent(kept, [tensor._version for tensor in kept] if given else None))

    def reap(self) -> None:
        """Let go of tensors that have been read. Raises ``TransportError`` for one that was given and has changed."""
        if not self._sent:
            return
        read = self.end.reap()
        while self._read < read:
            self._read += 1
            tensors, versions = self._sent.popleft()
            if versions is not None and versions != [tensor._version for tensor in tensors]:
                raise TransportError(
                    f"a tensor was changed in place after rank {self.link.source} had sent it on link "
                    f"'{self.link.name}' (shapes {[list(tensor.shape) for tensor in tensors]}), so the receiver may "
                    "have got either value; a stage must not change what it has returned: return a copy (.clone())"
                )

    def _plain(self, tensor: Tensor, place: str = "the value") -> Tensor:
        """As :func:`message.plain`; a tensor of a device comes to this end's."""
        if tensor.device.type != self.device.type or self.device.type == "cpu":
            return message.plain(tensor, place)
        message.check_plain(tensor, place)
        whole = tensor.detach().resolve_conj().resolve_neg().to(self.device).contiguous()
        return whole if whole.data_ptr() or not whole.numel() else whole.clone()


class CudaReceiver:
    """The receiving end of a link to ``device``. ``alone``: nobody else could send what is not there."""

    def __init__(self, link: Link, end: _C.DeviceReceiver, device: torch.device, alone: bool):
        self.link = link
        self.end = end
        self.device = device
        self._alone = alone

    def ready(self) -> bool:
        """See :meth:`pipekern.transport.base.Receiver.ready`."""
        return self.end.ready()

    def recv(self, tag: int, wait: float | None = None, into: Tensor | None = None) -> Message | None:
        """See :meth:`pipekern.transport.base.Receiver.recv`; the tensors are for the current stream.

        A link with a codec adds to ``into`` while it undoes the cast. Without one torch's sum reads the slot as well.
        """
        limit, stream = self._limit(wait), current_stream(self.device)
        if into is not None and self.link.codec != "none":
            added = self.end.recv_into(tag, into, limit, stream)
            if added is not False:
                return added
        arrived = self.end.recv(tag, limit, stream)
        if arrived is None or isinstance(arrived, Message):
            return arrived
        bundle, descriptor, digest = arrived
        return Message(unbundle(bundle, descriptor), digest)

    def _limit(self, wait: float | None) -> float:
        if self._alone and not self.end.announced():
            raise TransportError(
                f"rank {self.link.target} receives on link {self.link.name}, but rank {self.link.source} has not sent: "
                "in one process instructions must run in an order that is valid alone; see `pipekern schedule check`",
                self.link.source,
            )
        return -1.0 if wait is None else max(wait, 0.0)

    def held(self) -> list[tuple[int, ...]]:
        """See :meth:`pipekern.transport.base.Receiver.held`; of a bundle, all shapes until its last tensor is gone."""
        shapes: list[tuple[int, ...]] = []
        for item in self.end.held():
            shapes += [spec.shape for spec in split(item)[1]] if isinstance(item, bytes) else [item]
        return shapes

    def owns(self, pointer: int) -> bool:
        """See :meth:`pipekern.transport.base.Receiver.owns`."""
        return self.end.owns(pointer)


class CudaTransport:
    """This process's part of a job among devices of one host."""

    name = "cuda"

    def __init__(
        self,
        rank: int | None,
        world: int,
        token: str,
        timeout: float,
        barrier: Callable[[], object],
        devices: Sequence[torch.device],
        wait: str = "auto",
    ):
        """Join; returns when all ``world`` ranks have. ``token``, ``timeout`` and ``barrier`` as for shm.

        ``rank`` None: this process has every rank. ``devices``: one a rank; of other processes' ranks only the kind
        counts. ``wait``: "host" does without stream memory operations, "auto" only where the device has none. Raises
        ``TransportError``.
        """
        self._rank = rank
        self._devices = list(devices)
        self._wait_on_host = wait == "host"
        self._job = _C.Job(rank or 0, 1 if rank is None else world, token, timeout)
        barrier()  # every rank listens now
        self._job.connect()
        self._steward = _C.Steward(self._job)
        self._contexts: dict[int, _C.Context] = {}
        self._senders: dict[str, CudaSender] = {}
        self._receivers: dict[str, CudaReceiver] = {}
        self._closed = False
        self._leave = functools.partial(leave, weakref.ref(self))
        atexit.register(self._leave)

    def open(self, links: Sequence[Link]) -> tuple[dict[str, CudaSender], dict[str, CudaReceiver]]:
        """See :meth:`pipekern.transport.base.Transport.open`."""
        if any(link.codec != "none" for link in links):
            nvrtc.preload()  # before the extension looks for it, should it have no kernels of its own
        for number, link in enumerate(links):
            if self._rank in (None, link.source):
                self._senders[link.name] = self._sender(number, link)
        for number, link in enumerate(links):
            if self._rank in (None, link.target):
                self._receivers[link.name] = self._receiver(number, link)
        return dict(self._senders), dict(self._receivers)

    def _sender(self, number: int, link: Link) -> CudaSender:
        device = self._devices[link.source]
        target = 0 if self._rank is None else link.target
        end = _C.DeviceSender(
            self._job,
            self._steward,
            number,
            link.name,
            target,
            link.slots,
            _CODECS[link.codec],
            self._context(device),
            self._wait_on_host,
        )
        return CudaSender(link, end, device, self._receivers)

    def _receiver(self, number: int, link: Link) -> CudaReceiver:
        device = self._devices[link.target]
        source = 0 if self._rank is None else link.source
        end = _C.DeviceReceiver(
            self._job,
            self._steward,
            number,
            link.name,
            source,
            link.slots,
            _CODECS[link.codec],
            self._context(device),
            self._wait_on_host,
            (_DLPACK[device.type], device.index or 0),
        )
        return CudaReceiver(link, end, device, alone=self._rank is None)

    def _context(self, device: torch.device) -> _C.Context:
        index = device.index or 0
        if index not in self._contexts:
            self._contexts[index] = _C.Context(index)
        return self._contexts[index]

    def ways(self) -> dict[str, str]:
        """How tensors of this process's links go: local, ipc, or staged and why; empty before the first."""
        return {name: sender.end.way() for name, sender in self._senders.items()}

    def check(self) -> None:
        """See :meth:`pipekern.transport.base.Transport.check`; lets go of sent tensors that have been read."""
        self._job.check()
        for sender in self._senders.values():
            sender.reap()

    def abort(self, error: BaseException, where: str) -> None:
        """See :meth:`pipekern.transport.base.Transport.abort`. In one process it forgets every message instead."""
        if self._rank is None:
            try:
                for receiver in self._receivers.values():
                    receiver.end.drain(current_stream(receiver.device))
                return
            except TransportError:  # the device has failed: nothing can be used again
                pass
        self._job.abort(failure_text(error, f"rank {self._rank or 0} failed, in {where}:\n"))

    def close(self) -> None:
        """See :meth:`pipekern.transport.base.Transport.close`. Waits for what streams still do with the links."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._leave)
        for sender in self._senders.values():
            sender.end.close()
        for receiver in self._receivers.values():
            receiver.end.close()
        self._job.close()


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream on ``device``; the CPU's is the legacy default stream's, 0."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0
