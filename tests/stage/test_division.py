"""Units in tensor-parallel parts: what modules see, which random numbers they draw, and whose gradients are summed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel
from torch.nn import functional as F

from pipekern.errors import ConfigError
from pipekern.parallel.plan import choose_styles
from pipekern.parallel.tensor import Parts, local, whole
from pipekern.stage.division import Division, named_modules
from pipekern.stage.unit import Unit
from tests.launch import launch, values
from tests.runtime.divided import Mlp

COLUMN, ROW = ColwiseParallel(), RowwiseParallel()
BLOCK = {"up": COLUMN, "down": ROW}
WIDTH = 8


@contextmanager
def _group() -> Iterator[Parts]:
    dist.init_process_group("gloo")
    group = dist.new_group([0, 1])
    yield Parts(group, torch.device("cpu"), dist.get_rank(), 2, lambda: None)
    dist.destroy_process_group()


def _divided(model: nn.Module, plan: dict[str, ParallelStyle], parts: Parts) -> Division:
    unit = Unit("model", model, model)
    styles = choose_styles(plan, model, dict(named_modules([unit])), parts.size)
    return Division([unit], styles, parts, torch.device("cpu"))


def _golden() -> None:
    """A perceptron of two layers: the first by columns, the second by rows."""
    with _group() as parts:
        torch.manual_seed(dist.get_rank())  # every part takes the weights of the first
        model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
        division = _divided(model, {"0": COLUMN, "2": ROW}, parts)
        torch.manual_seed(0)
        same = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        assert [tuple(local(p.detach()).shape) for p in model.parameters()] == [(2, 2), (2,), (2, 2), (2,)]
        x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        output, wanted = model(x), same(other)
        assert type(output) is Tensor
        assert torch.allclose(output, wanted, rtol=0, atol=1e-14)
        output.square().sum().backward()
        wanted.square().sum().backward()
        division.finish(dict(model.named_parameters()))
        for p, q in zip([*model.parameters(), x], [*same.parameters(), other], strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.allclose(whole(p), q, rtol=0, atol=1e-14)
            assert torch.allclose(whole(p.grad), q.grad, rtol=0, atol=1e-14)
        assert type(x.grad) is Tensor
        assert division.layouts() == {
            "0.weight": "(Shard(dim=0),)",
            "0.bias": "(Shard(dim=0),)",
            "2.weight": "(Shard(dim=1),)",
            "2.bias": "(Replicate(),)",
        }
        counted = [name for name, _ in model.named_parameters() if division.counts(name)]
        assert counted == ["0.weight", "0.bias", "2.weight"] + ["2.bias"] * (parts.index == 0)


def test_golden_columns_then_rows() -> None:
    values(launch(_golden, 2))


class _Draws(nn.Module):
    """Draws where its input is in parts, and where it is whole, also by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(), Mlp()
        self.before, self.between = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, h: Tensor) -> Tensor:
        h = self.between(self.first(self.before(h)))
        return F.dropout(self.second(h), 0.5)


def _masks() -> dict[str, Tensor]:
    with _group() as parts:
        model = _Draws()
        model.first.inner.p = model.second.inner.p = 0.5
        _divided(
            model, {f"{name}.{layer}": style for name in ("first", "second") for layer, style in BLOCK.items()}, parts
        )
        seen: dict[str, Tensor] = {}
        for name in ("before", "between", "first.inner", "second.inner"):

            def note(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                seen[name] = output.detach() == 0

            model.get_submodule(name).register_forward_hook(note)
        found: dict[str, Tensor] = {}
        for key in (3, 4, 3):
            torch.manual_seed(key)
            output = model(torch.ones(64, WIDTH))
            assert torch.initial_seed() == key
            again = {f"{name} {key}": mask for name, mask in seen.items()} | {f"end {key}": output.detach() == 0}
            assert all(torch.equal(found[name], mask) for name, mask in again.items() if name in found), "not repeated"
            found |= again
        return found


def test_shards_are_dropped_apart_and_whole_values_alike() -> None:
    one, other = values(launch(_masks, 2))
    for name, mask in one.items():
        share = (mask == other[name]).double().mean()
        if "inner" in name:
            assert 0.4 < share < 0.6, f"{name}: the parts drop alike"
        else:
            assert share == 1.0, f"{name}: the parts drop apart"
    masks = [one["first.inner 3"], other["first.inner 3"], one["second.inner 3"], one["first.inner 4"]]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert 0.4 < (a == b).double().mean() < 0.6


def _unsplit_numbers() -> tuple[Tensor, Tensor]:
    """What is drawn of whole values is drawn as without parts."""
    with _group() as parts:
        outputs = []
        for plan in ({}, {"first.up": COLUMN, "first.down": ROW}):
            torch.manual_seed(0)
            model = _Draws()
            if plan:
                _divided(model, plan, parts)
            torch.manual_seed(1)
            outputs.append(model(torch.ones(16, WIDTH)).detach())
        return outputs[0], outputs[1]


def test_whole_values_are_dropped_as_in_the_unsplit_model() -> None:
    for without, divided in values(launch(_unsplit_numbers, 2)):
        assert torch.allclose(without, divided, atol=1e-5)


class _Heads(nn.Module):
    """A norm of each head; and a factor that is used on heads, in a module that gets whole values."""

    def __init__(self, factor: bool):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.LayerNorm(2), nn.Linear(8, 4)
        self.factor = nn.Parameter(torch.ones(2)) if factor else None

    def forward(self, h: Tensor) -> Tensor:
        heads = self.norm(self.up(h).unflatten(-1, (-1, 2)))
        if self.factor is not None:
            heads = heads * self.factor
        return self.down(heads.flatten(-2))


def _head_gradients(factor: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with _group() as parts:
        models = []
        for divided in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.LayerNorm(4), _Heads(factor)).double()
            division = _divided(model, {"1.up": COLUMN, "1.down": ROW}, parts) if divided else None
            for _ in range(2):
                model(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)).square().sum().backward()
            if division is not None:
                division.finish(dict(model.named_parameters()))
            models.append(model)
        one, other = ({n: whole(p.grad) for n, p in m.named_parameters() if p.grad is not None} for m in models)
        return one, other


def test_whole_weights_on_shards_get_the_sum_of_the_parts() -> None:
    for wanted, got in values(launch(_head_gradients, 2, False)):
        assert wanted.keys() == got.keys()
        for name, value in wanted.items():
            assert torch.allclose(got[name], value, rtol=0, atol=1e-13), name


def test_a_whole_weight_that_no_module_shows_on_shards_is_refused() -> None:
    for outcome in launch(_head_gradients, 2, True):
        assert outcome.error is not None
        assert "the gradient of 1.factor differs between the tensor-parallel parts" in outcome.error


def _sequence() -> None:
    """Norms that run on a part of the sequence each."""
    with _group() as parts:
        models = []
        for divided in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)).double()
            norm = model[1]
            assert isinstance(norm, nn.LayerNorm)
            nn.init.normal_(norm.weight)
            plan: dict[str, ParallelStyle] = {
                "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
                "1": SequenceParallel(),
                "2": ColwiseParallel(input_layouts=Shard(1)),
                "3": ROW,
            }
            division = _divided(model, plan, parts) if divided else None
            output = model(torch.arange(5)[None].repeat(2, 2))
            output.square().sum().backward()
            if division is not None:
                division.finish(dict(model.named_parameters()))
            models.append((output, model))
        (wanted, unsplit), (got, model) = models
        assert torch.allclose(wanted, got, rtol=0, atol=1e-13)
        for (name, p), (_, q) in zip(model.named_parameters(), unsplit.named_parameters(), strict=True):
            assert isinstance(p, DTensor)
            assert isinstance(p.grad, DTensor)
            assert p.grad.placements == p.placements
            assert q.grad is not None
            assert torch.allclose(whole(p.grad), q.grad, rtol=0, atol=1e-13), name


def test_sequence_parallel_norms() -> None:
    values(launch(_sequence, 2))


def _refusal(make: Callable[[], nn.Module], plan: dict[str, ParallelStyle]) -> str:
    with _group() as parts, pytest.raises(ConfigError) as caught:
        _divided(make(), plan, parts)
    return str(caught.value)


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    return model


def _convolution() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 2, 1))


@pytest.mark.parametrize(
    ("make", "plan", "text"),
    [
        (_tied, {"1": COLUMN}, r"0\.weight and 1\.weight are one weight, which the plan divides in several ways"),
        (_tied, {"0": COLUMN, "1": COLUMN}, "which the plan divides in several ways"),
        (_convolution, {"0": COLUMN}, "0 is a Conv1d"),
    ],
)
def test_refusals(make: Callable[[], nn.Module], plan: dict[str, ParallelStyle], text: str) -> None:
    for message in values(launch(_refusal, 2, make, plan)):
        assert re.search(text, message)
