"""The product that a model ends in: found where it is, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from pipekern.errors import ConfigError
from pipekern.stage.head import find_head
from pipekern.stage.unit import cut


class Ending(nn.Module):
    """A layer, and a head whose result goes through ``end``."""

    def __init__(self, end: Any, bias: bool = True):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head(self.norm(self.layers[0](x))))


def last(model: Any) -> Any:
    return cut(model, seed=0)[1][-1]


def test_golden() -> None:
    """Of a linear layer that stands last nothing is left; its input goes to the loss."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 7))
    head = find_head(last(model))
    assert head.linear is model[1] and head.name == "1"
    x = torch.randn(2, 4)
    assert head.train(x) is x and head.evaluate(x) is x


ENDS: dict[str, Any] = {
    "as it is": lambda y: y,
    "flatten": lambda y: y.flatten(0, 1),
    "flatten by name": lambda y: torch.flatten(y, start_dim=0, end_dim=-2),
    "transpose": lambda y: y.transpose(1, 2),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_trace_ends_in_it(end: str) -> None:
    """With the head in its place the rest gives what the whole gives, and its own names are untouched."""
    model = Ending(ENDS[end])
    unit = last(model)
    names = set(unit.state())
    head = find_head(unit)
    h, flag = torch.randn(2, 3, 4), end == "transpose"
    assert head.linear is model.head and head.transposed == flag
    for rest, whole in ((head.train, unit.train), (head.evaluate, unit.evaluate)):
        inner = rest(h)
        logits = head.linear(inner.transpose(1, 2)).transpose(1, 2) if flag else head.linear(inner)
        assert torch.equal(logits, whole(h))
    assert set(unit.state()) == names >= {"head.weight", "head.bias"}


def hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: None)
    return layer


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Tanh(), "is a Tanh"),
        (hooked(), "has hooks"),
        (Scaled(4, 4), "is a Scaled"),
        (torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizedLinear"),
        (Ending(lambda y: y + 1), "does not return"),
        (Ending(lambda y: (y, y)), "does not return"),
        (Ending(lambda y: y.flatten(1, 2)), "does not return"),
        (Ending(lambda y: y * y.mean()), "does not return"),
    ],
    ids=lambda value: "",
)
def test_no_head(layer: nn.Module, why: str) -> None:
    model = layer if isinstance(layer, Ending) else nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(ConfigError, match=why):
        find_head(last(model))


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="needs torch with Tensor.grad_dtype")
def test_a_head_with_a_main_gradient() -> None:
    layer = pk.nn.Linear(4, 7)
    assert find_head(last(nn.Sequential(nn.Tanh(), layer))).linear is layer
