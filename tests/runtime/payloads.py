"""Models that hand every kind of value from unit to unit, with and without tied weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.runtime.models import DIM, VOCABULARY, Kind, token_loss, tokens


@dataclass
class State:
    """A value of named parts."""

    hidden: Tensor
    keep: Tensor
    scale: float = 0.5


class Way(NamedTuple):
    """A kind of value: how it is made of hidden numbers and a mask without gradient, and taken apart."""

    pack: Callable[[Tensor, Tensor], Any]
    unpack: Callable[[Any], tuple[Tensor, Tensor]]


def _from_tuple(value: Any) -> tuple[Tensor, Tensor]:
    hidden, (scale, nothing), keep, index, constant = value
    assert (scale, nothing) == (1, None) and index.dtype is torch.int64 and not constant.requires_grad
    return hidden * scale + constant * index[:, None, None], keep


def _from_aliased(value: Any) -> tuple[Tensor, Tensor]:
    """Some of it for each place; one tensor is one tensor on the other side too."""
    hidden, again, (keep, other) = value
    assert again["hidden"] is hidden and keep is other
    return hidden * 0.25 + again["hidden"].sin(), keep


WAYS: dict[str, Way] = {
    "dict": Way(
        lambda h, keep: {"hidden": h, "keep": keep, "scale": 0.5, "nothing": None},
        lambda value: (value["hidden"] * value["scale"], value["keep"]),
    ),
    "dataclass": Way(State, lambda value: (value.hidden * value.scale, value.keep)),
    "tuple": Way(
        lambda h, keep: (h, [1, None], keep, keep[:, 0, 0].long() + 1, h.detach().cos()),
        _from_tuple,
    ),
    "aliased": Way(lambda h, keep: (h, {"hidden": h}, [keep, keep]), _from_aliased),
    "tensors": Way(lambda h, keep: (h, keep), lambda value: value),
}


class First(nn.Module):
    def __init__(self, way: Way, width: int):
        super().__init__()
        self.way, self.words = way, nn.Embedding(VOCABULARY, width)

    def forward(self, tokens: Tensor) -> Any:
        return self.way.pack(self.words(tokens), (tokens != 0)[..., None])


class Middle(nn.Module):
    def __init__(self, way: Way, width: int):
        super().__init__()
        self.way, self.into, self.out = way, nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, value: Any) -> Any:
        h, keep = self.way.unpack(value)
        return self.way.pack(h + self.out(self.into(h).tanh()) * keep, keep)


class Last(nn.Module):
    def __init__(self, way: Way, width: int):
        super().__init__()
        self.way, self.norm, self.head = way, nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, value: Any) -> Tensor:
        h, keep = self.way.unpack(value)
        return self.head(self.norm(h) * keep)


TYING = ("untied", "ends", "within")  # none; look-up and head; two products of a unit


def carrying(payload: str, tying: str, width: int = DIM) -> nn.Sequential:
    """Eight units that hand on a value of ``WAYS``, with weights tied as ``TYING`` says."""
    way = WAYS[payload]
    first, middle, last = First(way, width), [Middle(way, width) for _ in range(6)], Last(way, width)
    if tying == "ends":
        last.head.weight = first.words.weight
    for unit in middle if tying == "within" else ():
        unit.out.weight = unit.into.weight
    return nn.Sequential(first, *middle, last)


PAYLOADS: dict[str, Kind] = {
    f"{payload}, {tying}": Kind(partial(carrying, payload, tying), token_loss, tokens)
    for payload, tying in product(WAYS, TYING)
}
