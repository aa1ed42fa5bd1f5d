"""What a stage gets and gives where something skips stages: one value in parts, a part for each stage at the other end.

The value itself goes from stage to stage; what is sent past the next stage goes beside it, straight to where it is
joined. Gradients come back the same ways.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from pipekern.stage.skip import Carried
from pipekern.transport.value import distinct, tensors


def divide(value: Any, after: int, direct: Mapping[int, Collection[str]]) -> dict[int, Any]:
    """A stage's output by the stages that get a part: ``after`` the value with what rides along, the others of
    ``direct`` the names that skip to them.
    """
    if not direct:
        return {after: value}
    parts: dict[int, Any] = {to: {name: value.kept[name] for name in names} for to, names in direct.items()}
    riding = {name: saved for name, saved in value.kept.items() if not any(name in part for part in parts.values())}
    return {after: Carried(value.value, riding) if riding else value.value, **parts}


def merge(parts: Mapping[int, Any]) -> Any:
    """The value that :func:`divide` took apart, from the stages before; the nearest sent the value itself."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    nearest = max(parts)
    value = parts[nearest]
    carried = value if isinstance(value, Carried) else Carried(value, {})
    saved = [part for source, part in parts.items() if source != nearest]
    return Carried(carried.value, {name: one for part in [carried.kept, *saved] for name, one in part.items()})


class Spread:
    """Which leaves of a value are in which of its parts. It holds no tensor."""

    def __init__(self, whole: Any, parts: Mapping[int, Any]):
        self._peers = list(parts)
        self._places: list[list[int]] = []
        if len(parts) > 1:
            index = {id(leaf): i for i, leaf in enumerate(_leaves(whole))}
            self._count = len(index)
            self._places = [[index[id(leaf)] for leaf in _leaves(part)] for part in parts.values()]

    def gather(self, gradients: Mapping[int, Any]) -> Any:
        """The gradients of the whole's leaves from those of each part's; a leaf in several parts gets their sum."""
        if not self._places:
            return next(iter(gradients.values()))
        whole: list[Tensor | None] = [None] * self._count
        for peer, places in zip(self._peers, self._places, strict=True):
            part = gradients[peer]
            for place, given in zip(places, part if isinstance(part, list) else [part] * len(places), strict=True):
                before = whole[place]
                whole[place] = given if before is None else before if given is None else before + given
        return whole

    def scatter(self, gradient: Any) -> dict[int, Any]:
        """The gradients of each part's leaves from those of the whole's, as stages give them back."""
        if not self._places:
            return dict.fromkeys(self._peers, gradient)
        whole = gradient if isinstance(gradient, list) else [gradient]
        rows = [[whole[place] for place in places] for places in self._places]
        return {peer: row[0] if len(row) == 1 else row or None for peer, row in zip(self._peers, rows, strict=True)}


def _leaves(value: Any) -> list[Tensor]:
    return [tensor for tensor in distinct(tensors(value)) if tensor.requires_grad]
