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

Ranks on the CPU may be in the same job: links between two of them are those of ``shm.py``, links between one and a
device those of ``staged.py``.
"""

from __future__ import annotations

import atexit
import functools
import weakref
from collections.abc import Callable, Collection, Sequence

import torch

from pipekern import _C
from pipekern.errors import TransportError
from pipekern.transport import nvrtc
from pipekern.transport.base import Link, Receiver, Sender
from pipekern.transport.cuda_ends import CudaReceiver, CudaSender, DeviceSender, current_stream
from pipekern.transport.shm import failure_text, leave, shm_receiver, shm_sender
from pipekern.transport.staged import StagedReceiver, StagedSender

_CODECS = {"none": _C.Codec.NONE, "bf16": _C.Codec.BF16, "fp8": _C.Codec.FP8}
_DLPACK = {"cpu": 1, "cuda": 2}  # DLDeviceType


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
        hosts: Collection[int] = (),
    ):
        """Join; returns when all ``world`` ranks have. ``token``, ``timeout`` and ``barrier`` as for shm.

        ``rank`` None: this process has every rank. ``devices``: one a rank; of other processes' ranks only the kind
        counts. ``wait``: "host" does without stream memory operations, "auto" only where the device has none.
        ``hosts``: the ranks on the CPU, processes of their own. Raises ``TransportError``.
        """
        self._hosts = hosts
        self._rank = rank
        self._devices = list(devices)
        self._wait_on_host = wait == "host"
        self._job = _C.Job(rank or 0, 1 if rank is None else world, token, timeout)
        barrier()  # every rank listens now
        self._job.connect()
        self._steward = _C.Steward(self._job)
        self._contexts: dict[int, _C.Context] = {}
        self._senders: dict[str, Sender] = {}
        self._receivers: dict[str, Receiver] = {}
        self._sending: list[DeviceSender[_C.DeviceSender] | DeviceSender[_C.StagedSender]] = []
        self._receiving: list[_C.DeviceReceiver | _C.StagedReceiver] = []
        self._closed = False
        self._leave = functools.partial(leave, weakref.ref(self))
        atexit.register(self._leave)

    def open(self, links: Sequence[Link]) -> tuple[dict[str, Sender], dict[str, Receiver]]:
        """See :meth:`pipekern.transport.base.Transport.open`."""
        if any(link.codec != "none" for link in links) and self._rank not in self._hosts:
            nvrtc.preload()  # before the extension looks for it, should it have no kernels of its own
        for number, link in enumerate(links):
            if self._rank in (None, link.source):
                self._senders[link.name] = self._sender(number, link)
        for number, link in enumerate(links):
            if self._rank in (None, link.target):
                self._receivers[link.name] = self._receiver(number, link)
        return dict(self._senders), dict(self._receivers)

    def _sender(self, number: int, link: Link) -> Sender:
        if link.source in self._hosts:
            return shm_sender(self._job, number, link)
        device = self._devices[link.source]
        context = self._context(device)
        if link.target in self._hosts:
            staged = _C.StagedSender(self._job, number, link.name, link.target, link.slots, context)
            self._sending.append(StagedSender(link, staged, device, self._receivers))
        else:
            end = _C.DeviceSender(
                self._job,
                self._steward,
                number,
                link.name,
                0 if self._rank is None else link.target,
                link.slots,
                _CODECS[link.codec],
                context,
                self._wait_on_host,
            )
            self._sending.append(CudaSender(link, end, device, self._receivers))
        return self._sending[-1]

    def _receiver(self, number: int, link: Link) -> Receiver:
        if link.target in self._hosts:
            return shm_receiver(self._job, number, link)
        device = self._devices[link.target]
        context = self._context(device)
        if link.source in self._hosts:
            staged = _C.StagedReceiver(self._job, number, link.name, link.source, link.slots, context)
            self._receiving.append(staged)
            return StagedReceiver(link, staged, device)
        end = _C.DeviceReceiver(
            self._job,
            self._steward,
            number,
            link.name,
            0 if self._rank is None else link.source,
            link.slots,
            _CODECS[link.codec],
            context,
            self._wait_on_host,
            (_DLPACK[device.type], device.index or 0),
        )
        self._receiving.append(end)
        return CudaReceiver(link, end, device, alone=self._rank is None)

    def _context(self, device: torch.device) -> _C.Context:
        index = device.index or 0
        if index not in self._contexts:
            self._contexts[index] = _C.Context(index)
        return self._contexts[index]

    def ways(self) -> dict[str, str]:
        """How tensors of its links go from a CUDA device: local, ipc, or staged and why; empty before the first."""
        return {sender.link.name: sender.way() for sender in self._sending}

    def check(self) -> None:
        """See :meth:`pipekern.transport.base.Transport.check`; lets go of sent tensors that have been read."""
        self._job.check()
        for sender in self._sending:
            sender.reap()

    def abort(self, error: BaseException, where: str) -> None:
        """See :meth:`pipekern.transport.base.Transport.abort`. In one process it forgets every message instead."""
        if self._rank is None:
            try:
                for receiver in self._receivers.values():
                    assert isinstance(receiver, CudaReceiver)
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
        for sender in self._sending:
            sender.end.close()
        for receiver in self._receiving:
            receiver.close()
        self._job.close()
