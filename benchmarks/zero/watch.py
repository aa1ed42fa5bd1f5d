"""What one process sends through torch.distributed, and the memory that its tensors take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pipekern.transport.value import tensors

# Collectives of c10d: the kind, and how many times a ring of n sends the share (n - 1) / n of the whole from each.
RING = {
    "allreduce_": ("reduce", 2),
    "allreduce_coalesced_": ("reduce", 2),
    "reduce_": ("reduce", 1),
    "reduce_scatter_": ("reduce", 1),
    "_reduce_scatter_base_": ("reduce", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce", 1),
    "alltoall_base_": ("reduce", 1),  # pipekern's sum of parts on a CPU
    "allgather_": ("gather", 1),
    "_allgather_base_": ("gather", 1),
    "allgather_into_tensor_coalesced_": ("gather", 1),
    "broadcast_": ("broadcast", 1),
}


class Watch(TorchDispatchMode):
    """Sees every operation while it is entered. ``sent``: bytes by kind, as a ring sends them, whatever the backend
    does; ``collectives`` counts the calls. ``peak``: the most bytes there were after an operation that made a tensor,
    but for memory that kernels take for themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.collectives = 0
        self.peak = 0
        self._seen: dict[int, StorageWeakRef] = {}

    def start(self) -> None:
        """Count what is sent, and the peak, from here on."""
        self.sent.clear()
        self.collectives, self.peak = 0, self.alive()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as operations on what is here of it
        if func.namespace in ("c10d", "_c10d_functional") and "barrier" not in func.__name__:
            self._count(func._schema.name.split("::")[1], args)
        result = func(*args, **(kwargs or {}))
        fresh = False
        for tensor in tensors((args, result)):
            storage = tensor.untyped_storage()
            if tensor.device.type != "meta" and storage._cdata not in self._seen:
                self._seen[storage._cdata] = StorageWeakRef(storage)
                fresh = True
        if fresh:
            self.peak = max(self.peak, self.alive())
        return result

    def _count(self, name: str, args: Any) -> None:
        kind, times = RING[name]
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        n = dist.ProcessGroup.unbox(group).size()
        whole = max(sum(t.nbytes for t in tensors(arg)) for arg in args)
        self.sent[kind] += times * whole * (n - 1) // n
        self.collectives += 1

    def alive(self) -> int:
        """Bytes that something still holds."""
        total = 0
        for key, held in list(self._seen.items()):
            storage: Any = torch.UntypedStorage._new_with_weak_ptr(held.cdata)
            if storage is None:
                del self._seen[key]
            else:
                total += storage.nbytes()  # as it is now: sharding libraries free memory by resizing
        return total


def distinct_bytes(found: Iterable[Tensor], taken: set[int]) -> int:
    """Of the memories of ``found`` that are not among ``taken``, to which they are added."""
    total = 0
    for tensor in found:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        if storage._cdata not in taken and local.device.type != "meta":
            taken.add(storage._cdata)
            total += storage.nbytes()
    return total
