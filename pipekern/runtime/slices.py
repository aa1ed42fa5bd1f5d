"""What goes to another host in slices: what all tensor-parallel parts have alike, each sends one part of.

The parts of the stage that gets it put it together among themselves, on a host of their own. So 1 / parts of the bytes
go between hosts. A slice is of the flat tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipekern.parallel.tensor import Parts
from pipekern.stage.alike import is_alike, mark
from pipekern.transport.value import distinct, map_tensors, tensors

_LEAST = 1 << 10  # bytes: what is smaller goes whole, for a gather has a latency


class Slices:
    """A stage's messages of training with one other stage, among ``parts``. A message is (what is sliced, value):
    [place among the value's tensors, *shape] of each.
    """

    def __init__(self, parts: Parts):
        self._parts = parts
        self._same: dict[tuple[int, ...], dict[int, bool]] = {}  # what had the same bits, by numbers of elements
        self._came: dict[int, list[bool]] = {}  # by micro-batch: which leaves of what came were sliced

    def cut(self, value: Any) -> tuple[list[list[int]], Any]:
        """An output, as it goes: what its graph says is alike, in slices."""
        return self._cut(value, lambda tensor: tensor.requires_grad and is_alike(tensor))

    def join(self, microbatch: int, message: tuple[list[list[int]], Any]) -> Any:
        """An input, put together. Collective among the parts."""
        value = self.joined(message)
        places = {place for place, *_ in message[0]}
        leaves = enumerate(distinct(tensors(value)))
        self._came[microbatch] = [place in places for place, leaf in leaves if leaf.requires_grad]
        return value

    def cut_gradient(self, microbatch: int, gradient: Any) -> tuple[list[list[int]], Any]:
        """The gradients of what :meth:`join` gave, as they go back: in slices where that was."""
        given = gradient if isinstance(gradient, list) else [gradient]
        pairs = list(zip(given, self._came.pop(microbatch), strict=False))
        return self._cut(gradient, lambda tensor: all(came for one, came in pairs if one is tensor))

    def joined(self, message: tuple[list[list[int]], Any]) -> Any:
        """What was cut, put together, and known to be alike. Collective among the parts."""
        rows, value = message
        found = distinct(tensors(value))
        whole = {id(found[place]): self._gather(found[place], shape) for place, *shape in rows}
        return map_tensors(lambda tensor: whole.get(id(tensor), tensor), value)

    def _cut(self, value: Any, able: Callable[[Tensor], bool]) -> tuple[list[list[int]], Any]:
        found = distinct(tensors(value))
        same = self._same.setdefault(tuple(tensor.numel() for tensor in found), {})
        sliced: list[tuple[int, Tensor]] = []
        for i, tensor in enumerate(found):
            if self._divides(tensor) and able(tensor):  # each time: a forward may go another way
                if i not in same:
                    same[i] = self._compare(tensor)
                if same[i]:
                    sliced.append((i, tensor))
        slices = {id(tensor): self._slice(tensor.reshape(-1)) for _, tensor in sliced}
        return [[i, *tensor.shape] for i, tensor in sliced], map_tensors(lambda t: slices.get(id(t), t), value)

    def _divides(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.numel() % self._parts.size == 0 and tensor.nbytes >= _LEAST

    def _compare(self, tensor: Tensor) -> bool:
        """Whether all parts have the same bits: a style that does not say what it returns is found out so."""
        own = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        rows = own.new_empty(self._parts.size, len(own))
        rows[self._parts.index] = own
        self._parts.gather(rows.view(-1)).wait()
        return bool((rows == rows[0]).all())

    def _slice(self, flat: Tensor) -> Tensor:
        return flat.tensor_split(self._parts.size)[self._parts.index]

    def _gather(self, own: Tensor, shape: Sequence[int]) -> Tensor:
        flat = own.new_empty(self._parts.size * own.numel())
        self._slice(flat).copy_(own.detach())
        self._parts.gather(flat).wait()
        return mark(flat.view(shape).requires_grad_(own.requires_grad))
