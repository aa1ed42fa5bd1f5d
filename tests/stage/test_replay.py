"""Stages of models whose forward cannot be traced."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.stage.chain import chains
from pipekern.stage.replay import Shape
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


def _through(model: Around, hidden: Tensor) -> Tensor:
    mask = torch.ones(hidden.shape[1], hidden.shape[1]).tril()
    for layer in model.layers:
        hidden = layer(hidden, mask=mask)
    return hidden


def _own_parameter(model: Around, ids: Tensor) -> Any:
    """A value of the model's own parameter and buffer goes into every layer, as a mask."""
    bias = (model.scale + model.table).mean() + torch.ones(ids.shape[1], ids.shape[1])
    hidden = model.embed(ids)
    for layer in model.layers:
        hidden = layer(hidden, mask=bias)
    return {"logits": model.head(hidden)}


@pytest.mark.parametrize("body", [_own_parameter, lambda model, ids: model.head(_through(model, model.embed(ids)))])
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


def _writes(model: Around, ids: Tensor) -> Any:
    into = torch.zeros(ids.shape[1], ids.shape[1], dtype=torch.float64)
    hidden = model.embed(ids)
    into[0, 0] = hidden.mean()
    for layer in model.layers:
        hidden = layer(hidden, mask=into + 1)
    return model.head(hidden)


def _skips(model: Around, ids: Tensor) -> Any:
    first = model.embed(ids)
    return model.head(_through(model, first)) + first.mean()


def _regularised(model: Around, ids: Tensor) -> Any:
    return model.head(_through(model, model.embed(ids))) + sum(p.square().sum() for p in model.parameters())


def _tied_by_hand(model: Around, ids: Tensor) -> Any:
    return _through(model, model.embed(ids)) @ model.embed.weight.T + model.head.bias


def _writes_out(model: Around, ids: Tensor) -> Any:
    into = torch.zeros(*ids.shape, 4, dtype=torch.float64)
    hidden = model.embed(ids)
    torch.mul(hidden.detach(), 2, out=into)
    return model.head(_through(model, hidden) + into)


def _writes_batch(model: Around, ids: Tensor) -> Any:
    ids.clamp_(min=1)
    return model.head(_through(model, model.embed(ids)))


def _writes_buffer(model: Around, ids: Tensor) -> Any:
    output = model.head(_through(model, model.embed(ids)))
    model.table[0] += 1
    return output


def _assigns_buffer(model: Around, ids: Tensor) -> Any:
    model.table = model.table + 1
    return model.head(_through(model, model.embed(ids)))


def _draws_python(model: Around, ids: Tensor) -> Any:
    scale = 1 + random.random()
    return model.head(_through(model, model.embed(ids) * scale)) / scale


def _takes_from_hook(model: Around, ids: Tensor) -> Any:
    """As transformers takes attentions and router logits: of the layers of this stage, there would be some."""
    seen: list[Tensor] = []
    hooks = [_mix(layer).register_forward_hook(lambda *call: seen.append(call[2])) for layer in model.layers]
    try:
        output = model.head(_through(model, model.embed(ids)))
    finally:
        for hook in hooks:
            hook.remove()
    return {"logits": output, "seen": tuple(seen)}


def _mix(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, Layer)
    return layer.mix


def _draws(model: Around, ids: Tensor) -> Any:
    model.embed(ids)
    return model.head(_through(model, model.embed(ids) + torch.rand(())))


def _looks(model: Around, ids: Tensor) -> Any:
    hidden = model.embed(ids)
    return model.head(_through(model, -hidden if bool(hidden.mean() > 0) else hidden))


def _ends_early(model: Around, ids: Tensor) -> Any:
    return _through(model, model.embed(ids))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (_writes, "writes a value of a layer into a tensor by __setitem__"),
        (_skips, "holds a value that an earlier stage made"),
        (_draws, r"draws random numbers \(rand\)"),
        (_looks, "looks into a value of an earlier stage"),
        (_ends_early, "ended without a call of after"),
        (_regularised, "holds a value that an earlier stage made"),
        (_tied_by_hand, "takes a value of shape|holds a value"),
        (_writes_out, "writes a value of a layer into a tensor by mul"),
        (_writes_batch, "writes into its batch in place"),
        (_writes_buffer, "writes into a buffer of its own"),
        (_assigns_buffer, "assigns its buffer table"),
        (_draws_python, "random numbers of Python"),
        (_takes_from_hook, "left a layer by another way"),
    ],
)
def test_what_no_cut_can_follow_is_refused(body: Callable[[Around, Tensor], Any], said: str) -> None:
    model, ids = Around(body).double(), torch.randint(11, (2, 3))
    counts = (4, 1) if body is _ends_early else (2, 3) if body is _skips else (1, 4)
    with pytest.raises(ConfigError, match=said):
        run(model, ids, *counts)


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
            return self.head(_through(self, self.embed(batch["ids"]))) * batch["times"]

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
            return self.head(_through(self, self.embed(ids))) * self.calls

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
