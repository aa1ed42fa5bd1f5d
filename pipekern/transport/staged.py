"""The CUDA ends of links between a CUDA device and a rank on the CPU.

The CPU's end is that of ``shm.py``: it computes in the slot, and sends by one copy into it. The other side registers
the slots, which are host memory, with the driver. What it sends is copied straight into a slot by a stream, which
announces the message when it is through. What comes are tensors of the CPU in their slots, out of which a copy to the
device need not be waited for (``non_blocking``): a slot is free again after what the stream that was current when its
message was received has queued when the last view dies. No call here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipekern import _C
from pipekern.transport.base import Link
from pipekern.transport.cuda_ends import DeviceSender, current_stream
from pipekern.transport.shm import ShmReceiver


class StagedSender(DeviceSender[_C.StagedSender]):
    """From a device to a rank on the CPU."""

    def way(self) -> str:
        """See ``DeviceSender.way``."""
        return f"staged: rank {self.link.target} is on the CPU"

    def _send_bundle(self, tag: int, descriptor: bytes, tensors: Sequence[Tensor], digest: int, given: bool) -> bool:
        pieces = [(tensor.data_ptr(), tensor.nbytes, tensor.device == self.device) for tensor in tensors]
        return self.end.send_bundle(tag, descriptor, pieces, digest, current_stream(self.device), given)


class StagedReceiver(ShmReceiver):
    """From a rank on the CPU to one on ``device``; what it returns may be used in the current stream."""

    def __init__(self, link: Link, end: _C.StagedReceiver, device: torch.device):
        super().__init__(link, end, lambda tag, wait: end.recv(tag, wait, current_stream(device)))
