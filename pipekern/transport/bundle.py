"""Messages of several tensors over a link between devices: some came through device memory, some through the host's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipekern import _C
from pipekern.errors import TransportError
from pipekern.transport import message
from pipekern.transport.message import DTYPE_CODE
from pipekern.transport.shm import aligned


def split(descriptor: bytes) -> tuple[bytes, list[message.TensorSpec], bytes]:
    """The descriptor, its tensors, and for each of them 1 if it travelled through device memory."""
    end = descriptor.rfind(b"}") + 1  # JSON ends with it, and no place is that byte
    return descriptor[:end], message.specs(descriptor[:end]), descriptor[end:]


def unbundle(bundle: _C.DeviceBundle, descriptor: bytes) -> Any:
    """The value that the bundle holds, with tensors that view its memory."""
    text, specs, places = split(descriptor)
    if len(specs) != len(places):
        raise TransportError(f"a message has {len(specs)} tensors and {len(places)} places")
    tensors: list[Tensor] = []
    offset, index = bundle.host_start, 0
    for spec, here in zip(specs, places, strict=True):
        if here:
            tensors.append(bundle.view_device(index, DTYPE_CODE[spec.dtype], spec.shape))
            index += 1
        else:
            tensors.append(bundle.view_host(offset, DTYPE_CODE[spec.dtype], spec.shape))
            offset = aligned(offset + spec.nbytes)
    return message.unpack(text, tensors)
