"""The ends of links between CUDA devices: messages between torch and ``csrc/cuda``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from pipekern import _C
from pipekern.errors import TransportError
from pipekern.transport import message
from pipekern.transport.base import Link, Message, Receiver
from pipekern.transport.bundle import split, unbundle

_End = TypeVar("_End", _C.DeviceSender, _C.StagedSender)


class _Sent(NamedTuple):
    """Tensors of one message but those in received slots, and their versions where nobody may change them."""

    tensors: list[Tensor]
    versions: list[int] | None


class DeviceSender(ABC, Generic[_End]):
    """The sending end of a link from ``device``; ``receivers`` are all receiving ends of this process."""

    def __init__(self, link: Link, end: _End, device: torch.device, receivers: Mapping[str, Receiver]):
        self.link = link
        self.end: _End = end
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
        on_device = [tensor for tensor in tensors if tensor.device == self.device]
        own, given = self._own(on_device, given)
        sent = self._send_bundle(tag, descriptor, tensors, digest, given)
        if sent and on_device:
            self._keep(own, given)
        return sent

    @abstractmethod
    def way(self) -> str:
        """How tensors go on this link; see :meth:`pipekern.transport.cuda.CudaTransport.ways`."""

    @abstractmethod
    def _send_bundle(self, tag: int, descriptor: bytes, tensors: Sequence[Tensor], digest: int, given: bool) -> bool:
        """See ``pipekern/_C.pyi``; ``tensors`` are those of the descriptor, in order."""

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


class CudaSender(DeviceSender[_C.DeviceSender]):
    """To another CUDA device."""

    def way(self) -> str:
        """See ``DeviceSender.way``."""
        return self.end.way()

    def _send_bundle(self, tag: int, descriptor: bytes, tensors: Sequence[Tensor], digest: int, given: bool) -> bool:
        places = bytes(tensor.device == self.device for tensor in tensors)
        on_host = [(tensor.data_ptr(), tensor.nbytes) for tensor, here in zip(tensors, places, strict=True) if not here]
        on_device = [tensor for tensor, here in zip(tensors, places, strict=True) if here]
        stream = current_stream(self.device)
        return self.end.send_bundle(tag, descriptor + places, on_host, on_device, digest, stream, given)


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


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream on ``device``; the CPU's is the legacy default stream's, 0."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0
