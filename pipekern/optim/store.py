"""The parameters of a process as its optimizer sees them, where that is not how its stages see them: masters of low
precision, shards, and gradients summed over replicas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pipekern.errors import ConfigError
from pipekern.optim.bucket import Bucket, Piece, divide
from pipekern.parallel.replicas import Pending, Replicas
from pipekern.parallel.tensor import divided, lay_into, local, part_of

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}

_ARRIVING = (
    1 << 26
)  # bytes at once, or one bucket: on a CPU parts of sums have memory of their own until they are added

Named = Sequence[tuple[str, nn.Parameter]]
Layout = list[list[str]]  # names by bucket
Dtypes = Mapping[str, torch.dtype]  # that a stage computes with, by a parameter's name, where masters are apart


def low_precision(named: Named, modules: Iterable[nn.Module], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """``dtype`` for every parameter but those of layers among ``modules`` with running statistics, which stay as they
    are and take inputs of it. Raises ``ConfigError`` for float64.
    """
    kept = {id(p) for module in modules if isinstance(module, _NormBase) for p in module.parameters(recurse=False)}
    wide = [name for name, p in named if p.dtype is torch.float64]
    if wide:
        raise ConfigError(
            f"precision={dtype}: {', '.join(wide)} are float64; call .float() on the model, or leave precision out"
        )
    return {name: dtype for name, p in named if p.is_floating_point() and id(p) not in kept}


def lay_out(stages: Mapping[int, Named], home: Mapping[int, int], dtypes: Dtypes, limit: int) -> dict[int, Layout]:
    """Which trained parameters of each stage lie together, by name. Those of several stages are in ``home[id]`` of them
    and lie alone. ``limit`` in bytes.
    """
    layouts: dict[int, Layout] = {}
    for stage, named in stages.items():
        kinds: dict[object, dict[int, tuple[str, int]]] = {}
        for name, p in named:
            if p.requires_grad and p.numel() and home.get(id(p), stage) == stage:
                grad_dtype = None if name in dtypes else p.grad_dtype  # it becomes float32
                kind = (dtypes.get(name), p.dtype, grad_dtype, id(p) if id(p) in home else 0)
                kinds.setdefault(kind, {}).setdefault(id(p), (name, p.nbytes))
        layouts[stage] = [run for kind in kinds.values() for run in divide(list(kind.values()), limit)]
    return layouts


class Store:
    """``stages[s]`` are the parameters of this process's stage s by name, which lie as ``layouts[s]`` says.

    A parameter that several stages have is a view of the same memory in all of them.
    """

    def __init__(
        self,
        stages: Mapping[int, Named],
        layouts: Mapping[int, Layout],
        dtypes: Dtypes,
        replicas: Replicas | None,
        zero: int,
    ):
        self.replicas, self.zero = replicas, zero
        self._known = {name: p for named in stages.values() for name, p in named}
        self.buckets: dict[int, list[Bucket]] = {stage: [] for stage in stages}
        for stage in stages:
            for names in layouts[stage]:
                named = [(name, self._known[name]) for name in names]
                self.buckets[stage].append(Bucket(named, dtypes.get(names[0]), replicas, zero))
        self.low = dtypes
        self._moved = moved = {id(p) for bucket in self for p in bucket.parameters}
        for name, p in self._known.items():
            if id(p) not in moved and name in dtypes:
                lay_into(p, local(p.detach()).to(dtypes[name]))  # frozen: nobody needs more of it
        self._own = {id(piece.of): piece for bucket in self for piece in bucket.pieces}
        own = {name: self._own[id(p)].parameter for name, p in self._known.items() if id(p) in self._own}
        self.parameters = {n: own.get(n, p) for n, p in self._known.items() if n in own or id(p) not in moved}
        keys = {(s, i): b for s, buckets in self.buckets.items() for i, b in enumerate(buckets)}
        places = {id(p): key for key, bucket in keys.items() for p in bucket.parameters}
        self._uses = {s: {places[id(p)] for _, p in named if id(p) in places} for s, named in stages.items()}
        self._gathers: dict[tuple[int, int], Pending] = {}
        self._late: deque[tuple[int, int]] = deque()  # sums to be begun, in the order of the program
        self._arriving: deque[tuple[int, Pending]] = deque()  # those under way, with the bytes of what arrives
        self.spans: list[tuple[str, int, int, Pending]] = []

    def __iter__(self) -> Iterator[Bucket]:
        for buckets in self.buckets.values():
            yield from buckets

    # -- a step

    def part(self) -> None:
        """Before a step, and before gradients of earlier ones are set aside: see :meth:`Bucket.part`."""
        for bucket in self:
            bucket.part()

    def begin(self) -> None:
        """Start a step: every gradient a zero. Raises ``ConfigError`` for a parameter that was frozen before."""
        thawed = [name for name, p in self._known.items() if p.requires_grad and p.numel() and not self.has(name)]
        if thawed:
            raise ConfigError(
                f"{', '.join(thawed)} took no gradient when the pipeline was made: there is no master and no sum over "
                "replicas for it; make the pipeline anew after requires_grad_()"
            )
        self.spans.clear()
        for bucket in self:
            bucket.begin()
            if not self.zero:
                bucket.gather()

    def gather(self, stage: int, index: int) -> None:
        """GATHER: begin to make the values of a bucket."""
        pending = self.buckets[stage][index].gather()
        if pending is not None:
            self._gathers[stage, index] = pending
            self._begun("GATHER", stage, index, pending)

    def _begun(self, op: str, stage: int, index: int, pending: Pending) -> None:
        for *_, earlier in self.spans:
            earlier.done()
        self.spans.append((op, stage, index, pending))

    def join(self, stage: int) -> None:
        """JOIN: wait for the values that ``stage`` computes with."""
        for key in sorted(self._uses[stage] & self._gathers.keys()):
            self._gathers.pop(key).wait()

    def reduce(self, stage: int, index: int) -> None:
        """REDUCE: begin the sum of a bucket's gradients over the replicas, as soon as not too many are under way; its
        values are not needed any more.
        """
        bucket = self.buckets[stage][index]
        bucket.seal()
        bucket.release()
        self._late.append((stage, index))
        self._advance()

    def _advance(self) -> None:
        """Add up what has arrived, and begin what there is room for."""
        while self._arriving and self._arriving[0][1].done():
            self._arriving.popleft()[1].wait()
        while self._late:
            stage, index = self._late[0]
            bucket = self.buckets[stage][index]
            if self._arriving and bucket.arriving + sum(size for size, _ in self._arriving) > _ARRIVING:
                return
            self._late.popleft()
            pending = bucket.reduce()
            self._arriving.append((bucket.arriving, pending))
            self._begun("REDUCE", stage, index, pending)

    def finish(self) -> None:
        """End a step: ``.grad`` of :attr:`parameters` is the sum."""
        while self._late:
            self._arriving.popleft()[1].wait()
            self._advance()
        self._arriving.clear()
        for bucket in self:
            bucket.finish()

    @property
    def idle(self) -> list[str]:
        """Of the last step, the parameters that nothing here has used; none where there is one replica: ``.grad`` is
        None then.
        """
        return [name for bucket in self for name in bucket.idle]

    def leave(self, names: Iterable[str]) -> None:
        """Let ``.grad`` of these be None, and not zero."""
        left = set(names)
        for bucket in self:
            for piece in bucket.pieces:
                if piece.name in left:
                    piece.parameter.grad = None

    def mark(self) -> None:
        """After a step of an optimizer that writes low precision and zeroes gradients: see :meth:`Bucket.mark`."""
        for bucket in self:
            bucket.mark()

    def copies(self) -> dict[nn.Parameter, Tensor]:
        """The low-precision part of each parameter that has one here."""
        return {p: values for bucket in self for p, values in bucket.copies().items()}

    def clear(self) -> None:
        """Forget a step that failed."""
        self._gathers.clear()
        self._late.clear()
        self._arriving.clear()
        for bucket in self:
            bucket.clear()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """In here all values are there, made of what the optimizer's parameters are now. Collective."""
        for stage, buckets in self.buckets.items():
            for index in range(len(buckets)):
                self.gather(stage, index)
        for stage in self.buckets:
            self.join(stage)
        try:
            yield
        finally:
            for bucket in self:
                bucket.release()

    # -- whole parameters

    def whole(self, of: Callable[[Piece], Tensor | None], of_gradients: bool = False) -> dict[str, Tensor]:
        """What ``of`` gives for each piece, put together over the replicas: by name in the model, a tensor of the
        parameter's shape for those of which it gives one, in parts where that is. Every replica must give alike;
        collective with shards.
        """
        found: dict[int, Tensor] = {}
        for bucket in self:
            parts = [of(piece) for piece in bucket.pieces]
            if not self.zero:
                found |= {
                    id(piece.of): part for piece, part in zip(bucket.pieces, parts, strict=True) if part is not None
                }
                continue
            dtype = bucket.gradient_dtype if of_gradients else bucket.masters.dtype
            for name, value in bucket.whole(parts, dtype).items():
                found[id(self._known[name])] = value
        return {name: found[id(p)] for name, p in self._known.items() if id(p) in found}

    def gradients(self, everywhere: Callable[[list[str]], Iterable[str]]) -> dict[str, Tensor]:
        """The gradients that have been summed and not used yet, whole, by name; ``everywhere`` gives all processes'
        names for this one's. Collective with shards.
        """
        self.part()
        own = {id(piece.of) for bucket in self for piece in bucket.pieces if piece.parameter.grad is not None}
        named = [name for name, p in self._known.items() if id(p) in own]
        there = set(everywhere(named) if self.zero else named)
        if not there:
            return {}
        found = self.whole(lambda piece: piece.parameter.grad, of_gradients=True)
        return {name: value for name, value in found.items() if name in there}

    def give_back(self, values: Mapping[str, Tensor]) -> None:
        """Let the stages' parameters have a memory of their own again: ``values``, by name, for those that are laid
        out. The store is of no use any more.
        """
        for name, p in self._known.items():
            p.grad = None
            p.data = values.get(name, p.data)

    def described(self) -> dict[str, Tensor]:
        """A tensor without memory for each parameter that is laid out, as :meth:`whole` gives it, by name."""
        dtypes = {id(p): bucket.masters.dtype for bucket in self for p in bucket.parameters}
        known = {name: p for name, p in self._known.items() if id(p) in dtypes}
        return {name: torch.empty(p.shape, dtype=dtypes[id(p)], device="meta") for name, p in known.items()}

    def part_of(self, name: str, value: Tensor) -> Tensor:
        """What of ``value`` belongs to the piece of the parameter ``name``; all, if its shape is another, or the piece
        a DTensor.
        """
        parameter = self._known[name]
        piece = self._own.get(id(parameter))
        if piece is None or value.shape != parameter.shape or divided(piece.parameter):
            return value
        part = part_of(parameter, value).reshape(-1)[piece.start : piece.start + piece.parameter.numel()]
        return part.view(piece.parameter.shape)

    def has(self, name: str) -> bool:
        """Whether the parameter ``name`` is laid out here."""
        return name in self._known and id(self._known[name]) in self._moved

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Copy a whole ``value`` into the parameter ``name``, as far as it is here."""
        piece = self._own.get(id(self._known[name]))
        if piece is not None:
            local(piece.parameter).copy_(part_of(piece.parameter, self.part_of(name, value)))
            torch.autograd.graph.increment_version(piece.parameter)  # of a DTensor, whose memory counts for itself
