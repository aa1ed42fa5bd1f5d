"""Cutting a model into units."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.stage.spec import LayerSpec
from pipekern.stage.unit import cut
from tests.runtime.models import Gpt


def test_golden() -> None:
    """A Sequential is cut at its children, nested ones included; a parameter keeps its name."""
    model = nn.Sequential(
        OrderedDict(into=nn.Linear(2, 3), trunk=nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), out=nn.Tanh())
    )
    root, units = cut(model, seed=0)
    assert root is model
    assert [unit.name for unit in units] == ["into", "trunk.0", "trunk.1", "out"]
    assert [name for unit in units for name, _ in unit.named_parameters()] == list(model.state_dict())
    assert {name for unit in units for name in unit.state()} == set(model.state_dict())


def test_a_layer_in_two_places_is_two_units() -> None:
    relu, linear = nn.ReLU(), nn.Linear(2, 2)
    _, units = cut(nn.Sequential(linear, relu, linear, relu), seed=0)
    assert [unit.train for unit in units] == [linear, relu, linear, relu]
    assert [name for unit in units for name, _ in unit.named_parameters()] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]


class Named(nn.Sequential):
    """Has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def test_what_is_more_than_a_sequence_stays_whole() -> None:
    """A subclass, a Sequential with a hook, an empty one."""
    hooked = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    hooked.register_forward_hook(lambda *_: None)
    _, units = cut(nn.Sequential(Named(nn.Linear(2, 2), nn.ReLU()), hooked, nn.Sequential()), seed=0)
    assert [unit.name for unit in units] == ["0", "1", "2"]


def test_specs_are_units_without_memory_until_they_are_built() -> None:
    _, units = cut([LayerSpec(nn.Linear, 3, 2), LayerSpec(nn.BatchNorm1d, 2)], seed=4)
    assert [unit.name for unit in units] == ["0", "1"]
    assert all(p.is_meta for unit in units for _, p in unit.named_parameters())
    built = units[0].built()
    assert [(name, p.is_meta) for name, p in built.named_parameters()] == [("0.weight", False), ("0.bias", False)]
    assert built.built() is built
    assert units[1].state().keys() == {f"1.{name}" for name in nn.BatchNorm1d(2).state_dict()}


def test_a_module_with_a_layer_list_has_what_is_before_and_after_it() -> None:
    model = Gpt(tied=True)
    _, units = cut(model, seed=0)
    assert [unit.name for unit in units] == ["before", *(f"blocks.{i}" for i in range(6)), "after"]
    names = {name for unit in units for name, _ in unit.named_parameters()}
    assert names == {name for name, _ in model.named_parameters(remove_duplicate=False)}


class Several(nn.Module):
    """A forward with three arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        x = x + y * scale
        for layer in self.layers:
            x = layer(x)
        return x


def test_arguments_of_the_forward_come_in_order_or_by_name() -> None:
    model = Several()
    first, *rest = cut(model, seed=0)[1]
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    batches: list[Any] = [(x, y, 0.5), {"scale": 0.5, "y": y, "x": x}]
    for value in batches:
        for unit in (first, *rest):
            value = unit.call(unit.train)(value)
        assert torch.equal(value, model(x, y, 0.5))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Sequential(), "no layers"),
        ([], "no layers"),
        ([nn.Linear(2, 2)], "LayerSpec"),
        ("abc", "str"),
        (3, "int"),
    ],
    ids=str,
)
def test_what_cannot_be_cut(model: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        cut(model, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_the_whole_model_are_refused(kind: str) -> None:
    """No rank runs it whole, so they would never fire."""
    for model in (nn.Sequential(nn.Linear(2, 2)), Several()):
        getattr(model, f"register_{kind}_hook")(lambda *_: None)
        with pytest.raises(ConfigError, match="hooks of its own"):
            cut(model, seed=0)
