"""The bytes that units keep for their backward, counted by what is still there after a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pipekern.stage.deferral import Deferral
from pipekern.stage.recompute import CHOICES
from pipekern.stage.skip import Carried, Save
from pipekern.stage.unit import Unit
from pipekern.transport.value import distinct, map_tensors, tensors

Run = Callable[[Any], Any]


class Made(TorchDispatchMode):
    """Remembers, without holding it, all memory that is made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tensors((args, kwargs or {}))}
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # else it is a view, or was written in place
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self, without: Iterable[int] = ()) -> int:
        """Bytes that something still holds, but for those of the storages ``without``."""
        skipped = set(without)
        return sum(size for key, (held, size) in self._made.items() if key not in skipped and not held.expired())


@dataclass
class Passing:
    """The memory of a tensor between units: who made it (-1: the batch), and whether a unit that keeps all holds it."""

    maker: int
    nbytes: int
    held: bool = False


class Footprint(NamedTuple):
    """What each unit keeps of one micro-batch, in bytes: ``kept[i]`` for each of ``CHOICES``, until its backward;
    ``waiting[i]`` for weight work from then on; the ``outputs`` that it hands on; ``ends[i]``, what it keeps more
    where a stage ends with it, of outputs that nothing holds within a stage; and ``saved[i]`` for a later unit.
    """

    kept: list[tuple[int, ...]]
    waiting: list[int]
    outputs: list[int]
    ends: list[int]
    saved: list[int]


class _Seen(NamedTuple):
    inner: int  # bytes made within that stay
    inputs: list[bool]  # which stay
    outputs: list[tuple[int, bool]]  # the place among the inputs of the memory it is in, or -1; whether it stays


class Look(NamedTuple):
    """What one unit holds by itself: ``seen`` for each of ``CHOICES``; bytes that are ``waiting`` for weight work; the
    ``sizes`` of its outputs' memory, the bytes of the ``output``, and those ``saved`` for a later unit.
    """

    seen: dict[str, _Seen]
    waiting: int
    sizes: list[int]
    output: int
    saved: int


def look(unit: Unit, runs: dict[str, Run], value: Any, output: Any) -> Look:
    """Run a unit on ``value`` as ``runs`` says for each of ``CHOICES``; ``output`` is what it made of it."""
    waiting = _waiting(unit, runs["none"], value)
    sizes = [t.untyped_storage().nbytes() for t in distinct(tensors(output))]
    saves = isinstance(unit.train, Save) and isinstance(output, Carried)
    saved = _nbytes(output.kept[unit.train.name]) if saves else 0
    return Look({how: _seen(runs[how], value) for how in CHOICES}, waiting, sizes, _nbytes(output), saved)


def footprint(looks: Sequence[Look], x: Any) -> Footprint:
    """Of units in a row, the first of which gets ``x``.

    Memory that goes from unit to unit is its maker's, and counts where the maker or a later unit holds it when nothing
    is made again, or hands it on; an input that only a recomputation holds counts to that unit.
    """
    passing = [Passing(-1, 0) for _ in distinct(tensors(x))]
    inputs, made = [], []
    for index, (seen, _, sizes, *_) in enumerate(looks):
        through = {at for at, _ in seen["none"].outputs}
        for at, stays in enumerate(seen["none"].inputs):
            passing[at].held |= stays or at in through  # the value goes on: some stage hands it to the next
        inputs.append(passing)
        pairs = zip(seen["none"].outputs, sizes, strict=True)
        passing = [passing[at] if at >= 0 else Passing(index, size, stays) for (at, stays), size in pairs]
        made.append(passing)
    for one in passing:
        one.held = True
    rows = zip(looks, inputs, made, strict=True)
    kept = [tuple(_kept(i, one.seen[how], given, own) for how in CHOICES) for i, (one, given, own) in enumerate(rows)]
    ends = [_own(i, row, held=False) for i, row in enumerate(made)]
    waiting, outputs, saved = ([getattr(one, what) for one in looks] for what in ("waiting", "output", "saved"))
    return Footprint(kept, waiting, outputs, ends, saved)


def _nbytes(value: Any) -> int:
    return sum(t.nbytes for t in distinct(tensors(value)))


def _kept(index: int, seen: _Seen, inputs: Sequence[Passing], outputs: Sequence[Passing]) -> int:
    of_input = sum(one.nbytes for one, stays in zip(inputs, seen.inputs, strict=True) if stays and not one.held)
    return seen.inner + of_input + _own(index, outputs, held=True)


def _own(index: int, outputs: Sequence[Passing], held: bool) -> int:
    own = {id(one): one.nbytes for one in outputs if one.maker == index and one.held == held}
    return sum(own.values())


def _seen(run: Run, value: Any) -> _Seen:
    given = map_tensors(torch.clone, value)  # not leaves, which autograd's own nodes would hold
    before = [t.untyped_storage() for t in distinct(tensors(given))]
    keys, inputs = [s._cdata for s in before], [StorageWeakRef(s) for s in before]
    with Made() as made:
        output = run(given)
    after = [t.untyped_storage() for t in distinct(tensors(output))]
    ends, outputs = [s._cdata for s in after], [StorageWeakRef(s) for s in after]
    graph = [t.grad_fn for t in tensors(output)]
    del given, before, output, after
    places = [keys.index(key) if key in keys else -1 for key in ends]
    stays = [(at, not held.expired()) for at, held in zip(places, outputs, strict=True)]
    result = _Seen(made.alive(ends), [not held.expired() for held in inputs], stays)
    del graph
    return result


def _waiting(unit: Unit, run: Run, value: Any) -> int:
    deferral = Deferral(unit.train.modules())
    with deferral:
        ends = [t for t in distinct(tensors(run(map_tensors(torch.clone, value)))) if t.requires_grad]
        if ends:
            torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])
    storages = [t.untyped_storage() for work in deferral.take() for t in work.kept]
    return sum({s._cdata: s.nbytes() for s in storages}.values())
