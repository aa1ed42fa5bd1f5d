"""Models whose forward no trace follows, and how to run them in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipekern.stage.chain import chains
from pipekern.stage.unit import Unit, cut

CPU = torch.device("cpu")
Part = Callable[[Any], Any]


def parts(model: nn.Module, *counts: int, inputs: list[str] | None = None) -> Iterator[Part]:
    """The model as functions of what crosses the cut before them, with so many units each."""
    units, first = cut(model, 0, inputs)[1], 0
    assert units[0].skeleton is not None, "the forward was traced"
    assert len(units) == sum(counts), [unit.name for unit in units]
    for count in counts:
        yield part(units[first : first + count], first)
        first += count


def part(units: list[Unit], first: int) -> Part:
    (run,) = chains(units, first, CPU, ([unit.train for unit in units], None))
    return lambda value: run([0] * len(units), value)


def run(model: nn.Module, value: Any, *counts: int) -> Any:
    for each in parts(model, *counts):
        value = each(value)
    return value


class Model(nn.Module):
    """Embeds, runs layers with a mask made of the batch's own length and values, and reads out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(4, 11)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        if bool((ids == 0).any()):  # looks at values
            hidden = hidden * 0.5
        mask = torch.ones(len(ids[0]), len(ids[0]), dtype=torch.bool, device=hidden.device).tril()
        for layer in self.layers:
            hidden = layer(hidden, mask=mask)
        return self.head(hidden)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weight = mask.to(x.dtype)
        return x + torch.tanh(self.mix((weight / weight.sum(1, keepdim=True)) @ x))


class Around(Model):
    """A forward given by ``body``, of (model, ids), that a trace refuses."""

    table: Tensor

    def __init__(self, body: Callable[[Around, Tensor], Any]) -> None:
        super().__init__()
        self.body = body
        self.scale = nn.Parameter(torch.rand(4))
        self.register_buffer("table", torch.rand(4))
        self.drop = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Any:
        assert len(ids) > 0  # no trace follows that
        return self.body(self, ids)


def through(model: Around, hidden: Tensor) -> Tensor:
    mask = torch.ones(hidden.shape[1], hidden.shape[1]).tril()
    for layer in model.layers:
        hidden = layer(hidden, mask=mask)
    return hidden
