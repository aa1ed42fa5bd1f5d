"""``pk.verify``: the unsplit model beside the pipeline."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.runtime.models import KINDS, build
from tests.runtime.parity import same_bits
from tests.runtime.step import PLACES, gradients, run


def _verify(ranks: int, kind: str, seed: int) -> tuple[Any, bool]:
    """What it found, and whether everything was as before."""
    model = build(kind, seed)
    loss_fn = KINDS[kind].loss_fn
    torch.manual_seed(seed)
    first, second = KINDS[kind].batch(8), KINDS[kind].batch(9)
    with pk.Pipeline(model, loss_fn=loss_fn, microbatches=4, ranks=ranks, schedule="looped-bfs") as pipe:
        pipe.train_step(*first)
        before = _everything(pipe)
        found = pk.verify(pipe, *second)
        unchanged = same_bits(before, _everything(pipe))
        return found, unchanged


def _everything(pipe: pk.Pipeline) -> tuple[Any, ...]:
    state = {name: value.clone() for name, value in pipe.state_dict().items()}
    return gradients(pipe), state, torch.get_rng_state()


@PLACES
@pytest.mark.parametrize("kind", KINDS)
def test_a_right_pipeline_has_tiny_errors(processes: bool, kind: str, seed: int) -> None:
    """The same answer on every rank, each parameter under its name; nothing is left changed."""
    results = run(processes, _verify, 2, kind, seed)
    found = results[0][0]
    for other, unchanged in results:
        assert other == found
        assert unchanged
    assert found.max_error < 1e-12
    assert found.loss_error < 1e-12
    model = build(kind, seed)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)} if kind != "lazy" else set()
    assert set(found.errors) == names or (kind == "lazy" and len(found.errors) == 10)
    assert f"of {len(found.errors)} parameters" in str(found)


class Wrong(torch.autograd.Function):
    """The identity, with a gradient that is off by ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factor, None


class Sabotaged(nn.Module):
    """A layer that a pipeline gets wrong: the gradient of its weight is off, but not in a copy of the layer."""

    def __init__(self, factor: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, Wrong.apply(self.weight, self.factor))

    def __deepcopy__(self, memo: dict[int, Any]) -> Sabotaged:
        copy = Sabotaged(1.0).double()
        copy.load_state_dict(self.state_dict())
        return copy


@pytest.mark.parametrize("factor", [1.001, 0.0, float("nan"), float("inf")])
def test_a_wrong_gradient_is_found_and_named(factor: float) -> None:
    """Also one that is not a number, which no comparison is larger than."""
    layers: list[nn.Module] = [nn.Linear(4, 4), Sabotaged(factor), nn.Linear(4, 4), nn.Linear(4, 4)]
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    pipe = pk.Pipeline(
        nn.Sequential(*layers).double(), loss_fn=F.mse_loss, microbatches=2, ranks=2, on_nonfinite="ignore"
    )
    with pipe:
        found = pk.verify(pipe, x, y)
    assert not found.max_error < 1e-5
    assert found.worst == "1.weight"
    assert all(error < 1e-12 for name, error in found.errors.items() if name != "1.weight")
    assert found.loss_error < 1e-12


def test_children_may_have_any_name() -> None:
    """Also those that the cut gives to what is around a layer list."""
    layers = OrderedDict(before=nn.Linear(4, 4), drop=nn.Dropout(0.5), after=nn.Linear(4, 4), last=nn.Dropout(0.5))
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    with pk.Pipeline(nn.Sequential(layers), loss_fn=F.mse_loss, microbatches=2, ranks=2) as pipe:
        found = pk.verify(pipe, x, y)
    assert max(found.max_error, found.loss_error) < 1e-5
