"""Cutting the forward of a module around its layer list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.stage.graph import Piece, cut_graph
from tests.runtime.models import Gpt, tokens


def _run(pieces: Sequence[Piece], *inputs: Any) -> Any:
    """The pieces one after the other."""
    value = pieces[0].train(*inputs)
    for piece in pieces[1:]:
        value = piece.train(value)
    return value


class Small(nn.Module):
    """Adds what it was given to what its two layers make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.layers:
            h = layer(h)
        return h + x


def test_golden() -> None:
    """Over each cut go the values made before it and used after it: (x, h), in the order they were made."""
    model = Small()
    pieces = cut_graph(model)
    assert [piece.name for piece in pieces] == ["layers.0", "layers.1", "after"]
    x = torch.randn(3, 2)
    skip, h = pieces[0].train(x)
    assert skip is x
    assert torch.equal(h, model.layers[0](x))
    assert torch.equal(_run(pieces, x), model(x))
    assert pieces[0].evaluate is pieces[0].train


@pytest.mark.parametrize("tied", [False, True])
def test_a_gpt_is_the_same_to_the_bit(tied: bool) -> None:
    """Mask, positions and skip connection included, and the gradients with it; for any length of sequence."""
    model = Gpt(tied)
    pieces = cut_graph(model)
    for samples in (1, 4):
        x = tokens(samples).x
        want, got = model(x), _run(pieces, x)
        assert torch.equal(want, got)
        parameters = list(model.parameters())
        grads = (
            torch.autograd.grad(got.square().sum(), parameters),
            torch.autograd.grad(want.square().sum(), parameters),
        )
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Inner(nn.Module):
    """A layer with a longer list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Nested(nn.Module):
    """The layer list is two modules down, and its layers hold longer lists."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.add_module("h", nn.ModuleList(Inner() for _ in range(3)))
        self.body.forward = self.run
        self.out = nn.Linear(2, 2)

    def run(self, x: Tensor) -> Tensor:
        for layer in self.body.get_submodule("h").children():
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x * 2))


def test_the_outermost_list_is_cut() -> None:
    model = Nested()
    pieces = cut_graph(model)
    assert [piece.name for piece in pieces] == ["before", "body.h.0", "body.h.1", "body.h.2", "after"]
    x = torch.randn(3, 2)
    assert torch.equal(_run(pieces, x), model(x))


class Options(nn.Module):
    """Arguments with defaults, a branch on one of them, and outputs of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> dict[str, Any]:
        if mask is None:
            x = x * scale
        return {"out": self.layers(x), "shape": x.shape, "parts": (x, None)}


def test_arguments_with_defaults_keep_them() -> None:
    model = Options()
    x = torch.randn(3, 2)
    got, want = _run(cut_graph(model), x), model(x)
    assert torch.equal(got["out"], want["out"])
    assert got["shape"] == want["shape"]
    assert torch.equal(got["parts"][0], want["parts"][0])
    assert got["parts"][1] is None


class Keyword(nn.Module):
    """A keyword without a default after arguments with one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor) -> Tensor:
        if mask is None:
            x = x * scale
        return self.layers(x)


def test_keywords_without_defaults() -> None:
    model = Keyword()
    x, scale = torch.randn(3, 2), torch.randn(3, 1)
    first, *rest = cut_graph(model)
    value = first.train(x=x, scale=scale)
    for piece in rest:
        value = piece.train(value)
    assert torch.equal(value, model(x, scale=scale))


class Modes(nn.Module):
    """Another code in training than in evaluation, also of what it calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return nn.functional.dropout(x, 0.5, self.training) + (1 if self.training else 2)


def test_both_modes_are_traced_and_the_modes_restored() -> None:
    model = Modes()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    pieces = cut_graph(model)
    assert [module.training for module in model.modules()] == modes
    x = torch.randn(3, 2)
    torch.manual_seed(1)
    got = _run(pieces, x)
    torch.manual_seed(1)
    assert torch.equal(got, model(x))
    value = x
    for piece in pieces:
        value = piece.evaluate(value)
    assert torch.equal(value, model.eval()(x))


class Again(nn.Module):
    """Calls a layer a second time, out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](self.layers[1](self.layers[0](x)))


def test_a_layer_called_twice_is_a_unit_twice() -> None:
    model = Again()
    pieces = cut_graph(model)
    assert [piece.name for piece in pieces] == ["layers.0", "layers.1", "layers.0"]
    x = torch.randn(3, 2)
    assert torch.equal(_run(pieces, x), model(x))


class Unused(Modes):
    """Parts that no forward uses, or evaluation alone."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.ones(3))
        self.register_buffer("cache", torch.ones(3), persistent=False)
        self.spare = nn.ModuleDict({"norm": nn.BatchNorm1d(2), "tied": self.layers[0]})
        self.late = nn.Linear(2, 2)
        self.same = self.layers[1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[1](self.layers[0](x))
        return x * 2 if self.training else self.late(x)


def test_what_is_not_used_keeps_its_names_and_a_home() -> None:
    """The state over all pieces has every name; what evaluation alone uses lives where evaluation uses it."""
    model = Unused()
    pieces = cut_graph(model)
    names = {name for piece in pieces for name in piece.train.state_dict()}
    assert names == model.state_dict().keys()
    assert "table" in pieces[0].train.state_dict()
    assert [piece.name for piece in pieces if "late.weight" in piece.train.state_dict()] == ["after"]
    assert dict(pieces[0].train.named_parameters())["alpha"] is model.alpha
    assert [piece.name for piece in pieces if "same.weight" in piece.train.state_dict()] == ["layers.1"]
    value = x = torch.randn(3, 2)
    for piece in pieces:
        value = piece.evaluate(value)
    assert torch.equal(value, model.eval()(x))


class Fewer(Modes):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        return self.layers[1](x) if self.training else x


class Constant(Modes):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x)) + torch.tensor([1.0, 2.0])


class Loop(Modes):
    def forward(self, x: Tensor) -> Tensor:
        while x.sum() > 0:
            x = self.layers[0](x)
        return x


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Fewer(), "other layers in training than in evaluation"),
        (Constant(), "register it as a buffer"),
        (Loop(), "cannot be traced around self.layers"),
        (nn.Linear(2, 2), "no nn.ModuleList or nn.Sequential"),
    ],
    ids=["modes", "constant", "loop", "no list"],
)
def test_what_a_trace_would_get_wrong_is_refused(model: nn.Module, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        cut_graph(model)
