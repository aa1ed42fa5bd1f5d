"""Stages of models whose forward cannot be traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipekern.stage.chain import chains
from pipekern.stage.replay import Shape
from pipekern.stage.unit import cut
from tests.stage.untraced import CPU, Around, Layer, Model, parts, run, through


def test_golden() -> None:
    """Over a cut go the batch, the shapes of what was made, and what the next call takes; the mask is made anew."""
    model, ids = Model().double(), torch.tensor([[1, 2, 3]])
    front, back = parts(model, 2, 3)
    crossing = front(ids)
    assert crossing.batch is ids
    assert crossing.calls == [
        ("embed", Shape((1, 3, 4), "float64", True)),
        ("layers.0", Shape((1, 3, 4), "float64", True)),
    ]
    assert crossing.following == "layers.1"
    (hidden,) = crossing.late
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    assert torch.equal(hidden, model.layers[0](model.embed(ids), mask))
    assert torch.equal(back(crossing), model(ids))


@pytest.mark.parametrize("counts", [(5,), (1, 4), (2, 2, 1), (1, 1, 1, 1, 1)])
def test_any_cut_is_the_same_to_the_bit_with_its_gradients(counts: tuple[int, ...]) -> None:
    model = Model().double()
    for shape in ((2, 3), (1, 6), (4, 1)):
        ids = torch.randint(11, shape)
        parameters = list(model.parameters())
        wanted = torch.autograd.grad(model(ids).square().sum(), parameters)
        got = run(model, ids, *counts)
        assert torch.equal(got, model(ids))
        gradients = torch.autograd.grad(got.square().sum(), parameters)
        assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


def _own_parameter(model: Around, ids: Tensor) -> Any:
    """A value of the model's own parameter and buffer goes into every layer, as a mask."""
    bias = (model.scale + model.table).mean() + torch.ones(ids.shape[1], ids.shape[1])
    hidden = model.embed(ids)
    for layer in model.layers:
        hidden = layer(hidden, mask=bias)
    return {"logits": model.head(hidden)}


@pytest.mark.parametrize("body", [_own_parameter, lambda model, ids: model.head(through(model, model.embed(ids)))])
@pytest.mark.parametrize("counts", [(5,), (1, 4), (2, 2, 1), (1, 1, 1, 1, 1)])
def test_what_a_forward_does_around_its_layers(body: Callable[[Around, Tensor], Any], counts: tuple[int, ...]) -> None:
    model, ids = Around(body).double(), torch.randint(11, (2, 3))
    got, wanted = run(model, ids, *counts), model(ids)
    assert torch.equal(*(one["logits"] if isinstance(one, dict) else one for one in (got, wanted)))


def test_names_and_units() -> None:
    model = Around(_own_parameter)
    units = cut(model, 0)[1]
    assert [unit.name for unit in units] == ["before", "layers.0", "layers.1", "layers.2", "after"]
    assert {name for unit in units for name in unit.state()} == set(model.state_dict())
    assert {name for name, _ in units[0].named_parameters()} == {"embed.weight", "scale"}


def _asks(model: Around, ids: Tensor) -> Any:
    """What a layer is, whether it trains, what its parameters are, and whether a value has a gradient."""
    dtype = next(model.parameters()).dtype
    hidden = model.embed(ids).to(dtype)
    mask = torch.ones(ids.shape[1], ids.shape[1])
    for layer in model.layers:
        kinds = isinstance(layer, Layer), layer.training, len(list(layer.parameters())), hidden.requires_grad
        hidden = layer(hidden, mask=mask * (1 + sum(kinds)))
    return model.head(hidden)


def _adds_in_place(model: Around, ids: Tensor) -> Any:
    hidden = model.embed(ids)
    mask = torch.ones(ids.shape[1], ids.shape[1])
    for layer in model.layers:
        before, hidden = hidden, layer(hidden, mask=mask)
        hidden += before
    return model.head(hidden)


def _rows(model: Around, ids: Tensor) -> Any:
    hidden = model.embed(ids)
    for layer in model.layers:
        hidden = layer(torch.stack([*hidden]), mask=torch.ones(ids.shape[1], ids.shape[1]))
    return model.head(hidden)


def _skips_layers(model: Around, ids: Tensor) -> Any:
    return model.head(model.layers[0](model.embed(ids), mask=torch.ones(3, 3)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("body", [_asks, _adds_in_place, _rows, _skips_layers])
@pytest.mark.parametrize("counts", [(5,), (1, 4), (2, 2, 1), (1, 1, 1, 1, 1)])
def test_what_a_forward_sees_of_its_layers(
    body: Callable[[Around, Tensor], Any], counts: tuple[int, ...], training: bool
) -> None:
    model, ids = Around(body).double().train(training), torch.randint(11, (2, 3))
    got, wanted = run(model, ids, *counts), model(ids)
    assert torch.equal(got, wanted)
    for a, b in zip(_gradients(got, model), _gradients(wanted, model), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def _gradients(output: Tensor, model: nn.Module) -> tuple[Any, ...]:
    return torch.autograd.grad(output.square().sum(), list(model.parameters()), allow_unused=True)


def test_a_batch_is_a_fresh_one_on_every_stage() -> None:
    """A forward that changes the dict it gets does so once."""

    class Counts(Around):
        def forward(self, batch: dict[str, Any]) -> Any:  # type: ignore[override]
            batch["times"] = batch["times"] + 1
            return self.head(through(self, self.embed(batch["ids"]))) * batch["times"]

    model, ids = Counts(_rows).double(), torch.randint(11, (2, 3))
    got = run(model, {"ids": ids, "times": 1}, 1, 2, 2)
    assert torch.equal(got, model({"ids": ids, "times": 1}))


def test_training_and_evaluation_share_what_a_forward_counts() -> None:
    class Counts(Around):
        def __init__(self) -> None:
            super().__init__(_rows)
            self.calls = 0

        def forward(self, ids: Tensor) -> Any:
            self.calls += 1
            assert len(ids) > 0
            return self.head(through(self, self.embed(ids))) * self.calls

    model, ids = Counts().double(), torch.randint(11, (2, 3))
    units = cut(model, 0)[1]
    way = [unit.train for unit in units], None
    first, second = chains(units, 0, CPU, way, way)
    got = first([0] * 5, ids), second([0] * 5, ids)
    assert torch.equal(got[1], 2 * got[0])


def test_a_module_that_takes_a_cache_is_one_of_a_unit() -> None:
    """It has no state, and must be given its cache all the same: positions count from there."""

    class Positions(nn.Module):
        def forward(self, ids: Tensor, cache: Any = None) -> Tensor:
            return torch.arange(ids.shape[1]) + (0 if cache is None else cache.length)

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = Positions()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

        def forward(self, ids: Tensor) -> Tensor:
            assert len(ids) > 0
            hidden = self.positions(ids).float()
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    units = cut(Placed(), 0)[1]
    assert any(isinstance(module, Positions) for module in units[0].evaluate.modules())
