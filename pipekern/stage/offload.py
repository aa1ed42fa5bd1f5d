"""A stage's activations in host memory: what autograd saves of a micro-batch leaves the device and comes back.

While a forward runs, autograd saves marks in the place of tensors (``torch.autograd.graph.saved_tensors_hooks``). After
it the memory behind all marks that still count is copied out, each byte once, whatever views lie over it; marks let go
of it when the copy is done, and find it again when their backward is near. Memory that something else holds is never
touched, only copied: nothing can read what is not there.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pipekern.stage.host import ALIGNED, Buffer, Host

_STAYS = 64  # the smallest blocks stay where they are, up to this part of a micro-batch's bytes: copies have a price


class Mark:
    """Stands for a saved ``tensor``, and knows its place in its storage once it has left."""

    __slots__ = ("__weakref__", "_block", "_counter", "_layout", "_tensor", "_version")

    def __init__(self, tensor: Tensor):
        self._counter = tensor.detach()  # the result of the node that saves it would hold the node
        self._tensor: Tensor | None = self._counter
        self._version = tensor._version

    def get(self) -> Tensor:
        """The tensor; raises ``RuntimeError``, as autograd does, where it was written in place after it was saved."""
        if self._counter._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of {self._counter.dtype} is at version {self._counter._version}; expected version "
                f"{self._version} instead. Write to a copy"
            )
        if self._tensor is not None:
            return self._tensor
        memory, (start, shape, stride) = self._block.memory, self._layout
        assert memory is not None, "a backward before its activations were fetched"
        dtype = self._counter.dtype
        offset = (start - self._block.start) // dtype.itemsize
        return torch.empty(0, dtype=dtype, device=memory.device).set_(memory.untyped_storage(), offset, shape, stride)

    def leave(self, block: Block) -> None:
        """Let go of the tensor, whose memory ``block`` has. Its version counter stays, in a tensor without memory."""
        assert self._tensor is not None
        self._layout = _range(self._tensor)[0], self._tensor.shape, self._tensor.stride()
        self._counter = self._tensor.detach()  # another one, for somebody may have got this one from here
        self._counter.data = self._tensor.new_empty(0)
        self._block, self._tensor = block, None

    def movable(self, device: torch.device, stay: Collection[int]) -> Tensor | None:
        """The tensor, if it is a plain one on ``device`` whose storage is none of ``stay``."""
        tensor = self._tensor
        if (
            type(tensor) is not Tensor
            or tensor.layout is not torch.strided
            or tensor.device != device
            or tensor.numel() == 0
            or tensor.is_conj()
            or tensor.is_neg()
            or tensor.is_quantized
            or tensor.untyped_storage()._cdata in stay
        ):
            return None
        return tensor


class Block:
    """Bytes from ``start`` to ``end`` of one storage, and the ``marks`` of the tensors in there, until they leave.

    Marks hold it, and nothing else does for long, so that ``memory``, where it has come back to, is given up with the
    last of them.
    """

    __slots__ = ("__weakref__", "end", "marks", "memory", "start", "storage")

    def __init__(self, tensor: Tensor, start: int, end: int):
        # A multiple, since the last bits of a product can depend on where its factors lie.
        self.storage, self.start, self.end = tensor.untyped_storage(), start // ALIGNED * ALIGNED, end
        self.marks: list[Mark] = []
        self.memory: Tensor | None = None

    def bytes(self) -> Tensor:
        """The memory as it lies on the device."""
        flat = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        return flat.set_(self.storage, self.start, (self.end - self.start,), (1,))

    def leave(self) -> None:
        """Let go of the memory."""
        for mark in self.marks:
            mark.leave(self)
        self.marks.clear()
        del self.storage


def _range(tensor: Tensor) -> tuple[int, int]:
    """First byte in its storage, and the one after the last."""
    start = int(tensor.storage_offset())
    last = start + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start * tensor.itemsize, (int(last) + 1) * tensor.itemsize


def _blocks(marks: Iterable[tuple[Mark, Tensor]]) -> list[Block]:
    """The bytes under all tensors, each once."""
    places = [(t.untyped_storage()._cdata, *_range(t), mark, t) for mark, t in marks]
    blocks: list[Block] = []
    last = 0
    for storage, start, end, mark, tensor in sorted(places, key=lambda place: place[:3]):
        if not blocks or storage != last or start >= blocks[-1].end:
            blocks.append(Block(tensor, start, end))
        blocks[-1].end = max(blocks[-1].end, end)
        blocks[-1].marks.append(mark)
        last = storage
    return blocks


def _without_small(blocks: Iterable[Block]) -> list[Block]:
    """Largest first, without the smallest, which together are a small part of the bytes."""
    ordered = sorted(blocks, key=lambda block: block.end - block.start, reverse=True)
    room = sum(block.end - block.start for block in ordered) // _STAYS
    while ordered and (room := room - (ordered[-1].end - ordered[-1].start)) >= 0:
        ordered.pop()
    return ordered


@dataclass
class _Parcel:
    """What of a micro-batch is put away: ``blocks``, by their places in ``buffer``. ``moving`` is the device's memory
    that a copy under way, up to ``event``, reads or writes.
    """

    blocks: list[weakref.ref[Block]]
    buffer: Buffer
    places: list[Tensor]
    event: torch.cuda.Event | None
    leaving: list[Block]
    moving: list[Tensor]


class Offload:
    """Puts the activations of ``microbatches`` of one stage on ``device`` away, into ``host``.

    In turn: the forward runs in :meth:`saving`; :meth:`put` begins the copies; :meth:`settle` lets the device's memory
    go; :meth:`fetch` begins to bring them back; :meth:`join` comes before the backward.
    """

    def __init__(self, microbatches: Collection[int], device: torch.device, host: Host):
        self._microbatches = frozenset(microbatches)
        self._device, self._host = torch.empty(0, device=device).device, host
        self._marks: dict[int, list[weakref.ref[Mark]]] = {}
        self._parcels: dict[int, _Parcel] = {}
        self.away: set[int] = set()

    def takes(self, microbatch: int) -> bool:
        """Whether a micro-batch is put away."""
        return microbatch in self._microbatches

    def saving(self, microbatch: int) -> AbstractContextManager[object]:
        """In here a forward saves marks, if its micro-batch is put away."""
        if microbatch not in self._microbatches:
            return nullcontext()
        found = self._marks[microbatch] = []

        def pack(tensor: Tensor) -> Mark:
            mark = Mark(tensor)
            found.append(weakref.ref(mark))
            return mark

        return torch.autograd.graph.saved_tensors_hooks(pack, Mark.get)

    def put(self, microbatch: int, there: Iterable[Tensor] = ()) -> None:
        """Begin to copy out what the forward has saved and its graph still holds, but for the memory of ``there``,
        which something else keeps: parameters, buffers, the batch.
        """
        stay = {t.untyped_storage()._cdata for t in there if t.layout is torch.strided}
        marks = [mark for one in self._marks.pop(microbatch) if (mark := one()) is not None]
        pairs = [(mark, tensor) for mark in marks if (tensor := mark.movable(self._device, stay)) is not None]
        blocks = _without_small(_blocks(pairs))
        sources = [block.bytes() for block in blocks]
        copied = self._host.put(sources)
        self._parcels[microbatch] = _Parcel([weakref.ref(block) for block in blocks], *copied, blocks, sources)

    def settle(self, microbatch: int) -> None:
        """Let go of what was copied: what is queued from now on comes after the copies, and may use the memory."""
        parcel = self._parcels[microbatch]
        self._host.wait(parcel.event)
        for block in parcel.leaving:
            block.leave()
        parcel.leaving.clear()
        parcel.moving.clear()
        self.away.add(microbatch)

    def fetch(self, microbatch: int) -> None:
        """Begin to bring back what its graph still holds."""
        parcel = self._parcels[microbatch]
        pairs = zip(parcel.blocks, parcel.places, strict=True)
        back = [(block, place) for one, place in pairs if (block := one()) is not None]
        parcel.moving, parcel.event = self._host.fetch(parcel.buffer, [place for _, place in back])
        for (block, _), memory in zip(back, parcel.moving, strict=True):
            block.memory = memory
        self.away.discard(microbatch)

    def join(self, microbatch: int) -> None:
        """Let what is queued from now on, the backward, come after the copies; then the graph alone holds them."""
        self._host.wait(self._parcels.pop(microbatch).event)

    def clear(self) -> None:
        """Forget what an exception left half done."""
        for parcel in self._parcels.values():
            self._host.wait(parcel.event)  # a copy under way still uses the memory
        self._parcels.clear()
        self._marks.clear()
        self.away.clear()
