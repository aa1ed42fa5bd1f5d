"""Parameters of one stage in one memory: what stages compute with, their gradients, and what optimizers change.

    values      what the stage computes with, every parameter a view             n numbers
    gradients   the step's sums over micro-batches, every ``.grad`` a view       n, in float32 for 16-bit values
    masters     what an optimizer changes: float32 for 16-bit values, else the values themselves
    reduced     the sum over replicas

With ``zero`` at least 1 masters and ``reduced`` are this replica's n / replicas alone; at 2 gradients are there from
``begin`` to ``finish`` only, at 3 values from ``gather`` to ``release`` only. Of a tensor-parallel parameter all this
is of the part that is here, in as much room as the largest part takes: every part's memory is cut alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.parallel.replicas import Pending, Replicas
from pipekern.parallel.tensor import as_part, divided, lay_into, local, room

_ALIGNED = 16  # bytes to which each parameter is aligned, as kernels read best


class Piece(NamedTuple):
    """``parameter`` is what an optimizer here changes of the stage's parameter ``of``: its elements from ``start`` on,
    in the order of a flat view. It has the shape of ``of`` where it is all of it, else one dimension. Of a DTensor it
    covers what is here: as a DTensor without ``zero``, else as a plain tensor.
    """

    name: str
    of: nn.Parameter
    start: int
    parameter: nn.Parameter


class Bucket:
    """``parameters``, of one dtype, by name. ``low``: the dtype in which the stage computes, with float32 masters;
    where it is None, their own.

    Their memory is taken over: each becomes a view. ``replicas`` is None where there is one.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        low: torch.dtype | None,
        replicas: Replicas | None,
        zero: int,
    ):
        self.names = [name for name, _ in parameters]
        self.parameters = [parameter for _, parameter in parameters]
        self._replicas, self._zero = replicas, zero
        parts, index = (replicas.size, replicas.index) if replicas is not None and zero else (1, 0)
        first = self.parameters[0]
        dtype = low or first.dtype
        self.gradient_dtype = torch.float32 if low else getattr(first, "grad_dtype", None) or dtype
        step = _ALIGNED // dtype.itemsize
        self._shapes = [local(p.detach()).shape for p in self.parameters]
        sizes = [-(-room(p) // step) * step for p in self.parameters]
        self._places = list(accumulate(sizes, initial=0))
        unit = step * parts
        self.count = -(-self._places[-1] // unit) * unit
        self._own = slice(self.count // parts * index, self.count // parts * (index + 1))
        self._apart = low is not None or zero == 3  # masters have a memory of their own
        self.values = torch.zeros(self.count, dtype=dtype, device=first.device)
        self.masters = self.values[self._own]
        if self._apart:
            self.masters = torch.zeros_like(self.masters, dtype=torch.promote_types(first.dtype, torch.float32))
        self._gradients: Tensor | None = None
        self._reduced: Tensor | None = None
        self._pending: Pending | None = None
        self.idle: list[str] = []  # of the last step: what no backward here has written a gradient of
        self._versions: list[int] = []  # of the gradients, as the step found them, then as the sum did
        self._zeros: dict[Tensor, int] = {}  # gradients that an optimizer has zeroed, and their versions then
        self._gradient_of: dict[str, Tensor | None] = {}  # of the pieces, by name
        self._views_of_gradients: list[Tensor] = []
        self._fresh: dict[str, int] = {}  # versions of the pieces that an optimizer made the values of, by name
        self.pieces = self._cut()
        self._take_over()
        for parameter in self.parameters if low is not None else ():
            parameter.grad_dtype = torch.float32
        if zero == 3:
            self.release()

    @torch.no_grad()
    def _take_over(self) -> None:
        """Copy the parameters here, one after the other, so that the memory of each is free before the next."""
        if self._apart:
            for piece in self.pieces:
                own = local(piece.of).reshape(-1)[piece.start : piece.start + piece.parameter.numel()]
                master = local(piece.parameter)
                master.copy_(own.view(master.shape))
        for parameter, view in zip(self.parameters, self._views(self.values), strict=True):
            view.copy_(local(parameter))
            lay_into(parameter, view)

    def _views(self, flat: Tensor) -> list[Tensor]:
        starts = zip(self._places, self._shapes, strict=False)
        return [flat[start : start + shape.numel()].view(shape) for start, shape in starts]

    def _cut(self) -> list[Piece]:
        pieces = []
        for name, parameter, whole, place in zip(self.names, self.parameters, self._shapes, self._places, strict=False):
            start, end = max(place, self._own.start), min(place + whole.numel(), self._own.stop)
            if self._zero and start >= end:
                continue
            shape = whole if end - start == whole.numel() else (end - start,)
            master = self.masters[start - self._own.start : end - self._own.start].view(shape)
            apart = self._apart or shape != whole or (self._zero > 0 and divided(parameter))
            piece = nn.Parameter(master if self._zero else as_part(parameter, master)) if apart else parameter
            pieces.append(Piece(name, parameter, start - place, piece))
        return pieces

    def _part(self, flat: Tensor, piece: Piece, origin: int) -> Tensor:
        """What ``piece`` covers of ``flat``, whose first element is number ``origin`` of the bucket."""
        start = self._places[self.names.index(piece.name)] + piece.start - origin
        shape = local(piece.parameter.detach()).shape
        return flat[start : start + shape.numel()].view(shape)

    # -- a step

    def part(self) -> None:
        """Before a step: gradients that an optimizer has zeroed are none, and others get a memory of their own."""
        for piece in self.pieces:
            grad = piece.parameter.grad
            if self._zeroed(grad):
                piece.parameter.grad = None
            elif grad is not None and self._replicas is not None:
                piece.parameter.grad = grad.clone()

    def _zeroed(self, grad: Tensor | None) -> bool:
        """Whether an optimizer has zeroed it, and nobody has written it since."""
        return grad is not None and self._zeros.get(grad) == grad._version

    def begin(self) -> None:
        """Let every gradient be zero, and among replicas a view of their common memory."""
        if self._replicas is None:
            for piece in self.pieces:
                grad = self._gradient_of.get(piece.name)
                piece.of.grad = grad if self._zeroed(grad) else None
            return
        if self._gradients is None:
            self._gradients = torch.zeros(self.count, dtype=self.gradient_dtype, device=self.values.device)
            views = zip(self.parameters, self._views(self._gradients), strict=True)  # .data: each counts versions alone
            self._views_of_gradients = [as_part(parameter, view.data) for parameter, view in views]
        else:
            self._gradients.zero_()
        for parameter, view in zip(self.parameters, self._views_of_gradients, strict=True):
            parameter.grad = view
        self._versions = self._writes()

    @property
    def arriving(self) -> int:
        """Bytes that a sum over replicas takes while it is under way."""
        if not self._zero or self.values.is_cuda:
            return 0
        return self.count * self.gradient_dtype.itemsize

    def seal(self) -> None:
        """After the last weight work: from here on gradients must stay as they are."""
        self._refuse_moved()
        found, self._versions = self._versions, self._writes()
        pairs = zip(self.names, found, self._versions, strict=True)
        self.idle = [name for name, before, after in pairs if before == after]

    def reduce(self) -> Pending:
        """Begin the sum over replicas of what is sealed."""
        assert self._gradients is not None and self._replicas is not None
        if self._zero:
            if self._reduced is None:
                self._reduced = self._gradients.new_empty(self.count // self._replicas.size)
            self._pending = self._replicas.scatter(self._gradients, self._reduced)
        else:
            self._reduced = self._gradients
            self._pending = self._replicas.sum(self._gradients)
        return self._pending

    def _writes(self) -> list[int]:
        """How often each gradient was written in place: of a DTensor, as such or into its memory."""
        views = self._views_of_gradients
        return [view._version + (local(view)._version if divided(view) else 0) for view in views]

    def _refuse_moved(self) -> None:
        """Raise for a gradient that is not where it is summed: it would be left out in silence."""
        for name, parameter, view in zip(self.names, self.parameters, self._views_of_gradients, strict=True):
            if parameter.grad is not view:
                raise ConfigError(
                    f"the gradient of {name} was put elsewhere during the step (a hook, or a sparse gradient), where "
                    "replicas do not find it; change .grad in place, and use dense gradients"
                )

    def finish(self) -> None:
        """Wait for the sum; what is there becomes the gradient of the pieces."""
        if self._replicas is None:
            for piece in self.pieces:
                grad = piece.of.grad
                if piece.of is not piece.parameter:
                    piece.of.grad = None
                piece.parameter.grad = self._gradient_of[piece.name] = grad
            return
        assert self._pending is not None and self._gradients is not None, "finish before reduce"
        self._pending.wait()
        self._pending = None
        if self._writes() != self._versions:
            raise ConfigError(
                f"a gradient of {', '.join(self.names)} was written after the last weight work, when its sum over "
                "replicas had begun; backward hooks must not write into .grad later"
            )
        for parameter in self.parameters:
            parameter.grad = None
        assert self._reduced is not None
        for piece in self.pieces:
            if piece.name not in self._gradient_of:  # the same objects in every step: optimizers know them again
                own = self._part(self._reduced, piece, self._own.start)
                self._gradient_of[piece.name] = as_part(piece.parameter, own)
            piece.parameter.grad = self._gradient_of[piece.name]
        if self._zero > 1:
            self._gradients = None
            self._views_of_gradients = []

    def clear(self) -> None:
        """Forget a step that failed."""
        self._pending = None
        for parameter in self.parameters:
            parameter.grad = None

    # -- values

    @property
    def made(self) -> bool:
        """Whether the values are those of the masters, as far as versions of tensors tell."""
        return self._fresh == {piece.name: piece.parameter._version for piece in self.pieces}

    def mark(self) -> None:
        """Say that an optimizer has written the values of its own part as well as the masters, where there was a
        gradient, and zeroed gradients.
        """
        stepped = [(piece, piece.parameter.grad) for piece in self.pieces]
        self._fresh |= {piece.name: piece.parameter._version for piece, grad in stepped if grad is not None}
        self._zeros = {grad: grad._version for _, grad in stepped if grad is not None}

    def copies(self) -> dict[nn.Parameter, Tensor]:
        """By piece that is apart: the part of the values that is rounded from it."""
        if not self._apart or self._zero == 3:
            return {}
        return {piece.parameter: self._part(self.values, piece, 0) for piece in self.pieces}

    @torch.no_grad()
    def gather(self) -> Pending | None:
        """Make the values of the masters: here, and begin to fetch the other replicas' parts."""
        if self._zero == 3:
            self.values.untyped_storage().resize_(self.values.nbytes)
        if self._apart and (self._zero == 3 or not self.made):
            self.values[self._own].copy_(self.masters)
        if self._replicas is not None and self._zero:
            return self._replicas.gather(self.values)
        return None

    def release(self) -> None:
        """At zero 3: give the memory of the values back."""
        if self._zero == 3:
            self.values.untyped_storage().resize_(0)

    # -- whole parameters

    @torch.no_grad()
    def whole(self, parts: Sequence[Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
        """One tensor a piece (its parameter, or what an optimizer keeps for it), put together with those of the other
        replicas: one a parameter, by name. Collective with ``zero``.
        """
        flat = torch.zeros(self.count, dtype=dtype, device=self.values.device)
        for piece, part in zip(self.pieces, parts, strict=True):
            if part is not None:
                self._part(flat, piece, 0).copy_(part)
        if self._replicas is not None and self._zero:
            self._replicas.gather(flat).wait()
        views = zip(self.names, self.parameters, self._views(flat), strict=True)
        return {name: as_part(parameter, view) for name, parameter, view in views}


def divide(sizes: Sequence[tuple[str, int]], limit: int) -> list[list[str]]:
    """Names with bytes, in runs of at most ``limit`` bytes, at least one name each."""
    runs: list[list[str]] = []
    left = 0
    for name, nbytes in sizes:
        if not runs or nbytes > left:
            runs.append([])
            left = limit
        runs[-1].append(name)
        left -= nbytes
    return runs
