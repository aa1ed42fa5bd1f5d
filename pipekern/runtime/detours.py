"""The lanes of a stage past its neighbours, for what skips stages: its values and gradients taken apart for them.

The value itself goes to the next stage, with what rides along; what is sent directly goes beside it, straight to the
stage that joins it, and its gradient comes back the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pipekern.runtime.batch import Batch
from pipekern.runtime.lane import Lane
from pipekern.stage.skip import Carried
from pipekern.transport.value import distinct, tensors


class Detours:
    """``arriving`` are the lanes from stages before the last one, ``leaving`` those to stages past the next one, each
    with the ``names`` of what it takes; all by the stage at the other end.
    """

    def __init__(self, arriving: Mapping[int, Lane], leaving: Mapping[int, Lane], names: Mapping[int, Sequence[str]]):
        self.lanes = {**arriving, **leaving}
        self._trunk: Lane | None = None
        self._arriving = list(arriving.values())
        self._leaving = [(lane, names[target]) for target, lane in leaving.items()]
        self._arrived: dict[int, Spread] = {}
        self._left: dict[int, Spread] = {}

    def join(self, trunk: Lane) -> None:
        """``trunk`` is the lane of the value itself."""
        self._trunk = trunk
        for lane in (trunk, *(lane for lane, _ in self._leaving)) if self._leaving else ():
            lane.beside = self._beside

    def _beside(self, lane: Lane, microbatch: int) -> Tensor | None:
        """The gradient that has come on another lane for the one leaf that ``lane`` has; for the trunk, of its own."""
        assert self._trunk is not None
        lanes = [self._trunk, *(leaving for leaving, _ in self._leaving)]
        places = self._left[microbatch].places
        own = places[lanes.index(lane)]
        found = [other.received(microbatch) for other, there in zip(lanes, places, strict=True) if there == own]
        return next((one for one in found if isinstance(one, Tensor)), None) if len(own) == 1 else None

    def begin(self, batch: Batch) -> None:
        """Start a step on ``batch``."""
        for lane in self.lanes.values():
            lane.begin(batch)

    def clear(self) -> None:
        """Forget what an exception left half done."""
        self._arrived.clear()
        self._left.clear()
        for lane in self.lanes.values():
            lane.clear()

    def forget(self, microbatch: int) -> None:
        """No backward will come."""
        self._arrived.pop(microbatch, None)
        self._left.pop(microbatch, None)

    def merge(self, microbatch: int, value: Any) -> Any:
        """The stage's input: ``value`` from the stage before, and what has arrived beside it."""
        if not self._arriving:
            return value
        parts = [value, *(lane.take_input(microbatch) for lane in self._arriving)]
        carried = value if isinstance(value, Carried) else Carried(value, {})
        saved = {name: one for part in (carried.kept, *parts[1:]) for name, one in part.items()}
        whole = Carried(carried.value, saved)
        self._arrived[microbatch] = Spread(whole, parts)
        return whole

    def divide(self, microbatch: int, value: Any) -> Any:
        """Hand on what leaves ``value``, the stage's output, here; returns the rest."""
        if not self._leaving:
            return value
        parts = [{name: value.kept[name] for name in names} for _, names in self._leaving]
        riding = {name: one for name, one in value.kept.items() if not any(name in part for part in parts)}
        rest = Carried(value.value, riding) if riding else value.value
        self._left[microbatch] = Spread(value, [rest, *parts])
        for (lane, _), part in zip(self._leaving, parts, strict=True):
            lane.hand_on(microbatch, part)
        return rest

    def gather(self, microbatch: int, gradient: Any) -> Any:
        """The gradients of the stage's output, from those of the rest and of what left here."""
        if not self._leaving:
            return gradient
        parts = [gradient, *(lane.take_gradient(microbatch) for lane, _ in self._leaving)]
        return self._left.pop(microbatch).gather(parts)

    def scatter(self, microbatch: int, gradient: Any) -> Any:
        """Hand back the gradients of what arrived here; returns those for the stage before."""
        if not self._arriving:
            return gradient
        first, *others = self._arrived.pop(microbatch).scatter(gradient)
        for lane, part in zip(self._arriving, others, strict=True):
            lane.hand_back(microbatch, part)
        return first


class Spread:
    """Which leaves of a value are in which of its parts. It holds no tensor.

    Gradients of a value's or a part's leaves are one tensor, or a list, None where there is none: see ``Stage``.
    """

    def __init__(self, whole: Any, parts: Sequence[Any]):
        index = {id(leaf): i for i, leaf in enumerate(_leaves(whole))}
        self._count = len(index)
        self.places = [[index[id(leaf)] for leaf in _leaves(part)] for part in parts]

    def gather(self, parts: Sequence[Any]) -> list[Tensor | None]:
        """The gradients of the whole's leaves from those of each part's; a leaf in several parts gets their sum."""
        whole: list[Tensor | None] = [None] * self._count
        for places, part in zip(self.places, parts, strict=True):
            for place, given in zip(places, part if isinstance(part, list) else [part] * len(places), strict=True):
                before = whole[place]
                whole[place] = given if before is None else before if given is None else before + given
        return whole

    def scatter(self, whole: Any) -> list[Any]:
        """The gradients of each part's leaves from those of the whole's."""
        every = whole if isinstance(whole, list) else [whole]
        rows = [[every[place] for place in places] for places in self.places]
        return [row[0] if len(row) == 1 else row or None for row in rows]


def _leaves(value: Any) -> list[Tensor]:
    return [tensor for tensor in distinct(tensors(value)) if tensor.requires_grad]
