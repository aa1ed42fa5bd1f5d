"""Linear layers in tensor-parallel parts whose weight gradient waits: those of the unsplit layer, made in W."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from pipekern.parallel.plan import choose_styles
from pipekern.parallel.tensor import Parts, local, whole
from pipekern.stage.deferral import Deferral
from pipekern.stage.division import Division, named_modules
from pipekern.stage.unit import Unit
from tests.launch import launch, values

STYLES: dict[str, tuple[ParallelStyle, ParallelStyle]] = {
    "whole between": (ColwiseParallel(), RowwiseParallel()),
    "in parts between": (
        ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1)),
        RowwiseParallel(output_layouts=Shard(1)),
    ),
    "gathered": (ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())),
}


class Two(nn.Module):
    """Five rows and columns between, of which the parts have three and two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def _divided(model: nn.Module, styles: dict[str, Any]) -> Division:
    dist.init_process_group("gloo")
    parts = Parts(dist.new_group([0, 1]), torch.device("cpu"), dist.get_rank(), 2, lambda: None)
    unit = Unit("model", model, model)
    return Division([unit], choose_styles(styles, model, dict(named_modules([unit])), 2), parts, torch.device("cpu"))


def _micro_batches(model: nn.Module, inputs: list[Tensor], deferral: Deferral | None) -> list[Any]:
    """B of all, then W of all in the other order; the works of each."""
    works = []
    for x in inputs:
        if deferral is None:
            model(x).square().sum().backward()
        else:
            with deferral:
                model(x).square().sum().backward()
            works.append(deferral.take())
    return works


def _gradients(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Two(8 if case == "in parts between" else 6 if case == "whole between" else 5).to(dtype)
    plain = copy.deepcopy(model)
    _divided(model, dict(zip(("up", "down"), STYLES[case], strict=True)))
    for p in (*model.parameters(), *plain.parameters()) if dtype is not torch.float64 else ():
        p.grad_dtype = torch.float32
    part = dist.get_rank()
    inputs = [torch.randn(2, 6, 4, dtype=dtype, requires_grad=True) for _ in range(2)]
    split = case == "in parts between"
    own = [(x.detach().chunk(2, dim=1)[part] if split else x.detach()).requires_grad_() for x in inputs]
    _micro_batches(plain, inputs, None)
    works = _micro_batches(model, own, Deferral(model.modules()))
    assert [len(one) for one in works] == [2, 2]
    assert all(p.grad is None for p in model.parameters())
    for one in reversed(works):
        for work in one:
            work()
    near = 1e-13 if dtype is torch.float64 else 0.1
    for x, y in zip(inputs, own, strict=True):
        assert x.grad is not None and y.grad is not None
        assert torch.allclose(y.grad, x.grad.chunk(2, dim=1)[part] if split else x.grad, rtol=near, atol=near)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert isinstance(p, DTensor) and isinstance(p.grad, DTensor) and q.grad is not None
        assert p.grad.placements == p.placements
        assert p.grad.dtype is local(p.grad).dtype is q.grad.dtype
        assert torch.allclose(whole(p.grad), q.grad, rtol=near, atol=near)
    before = [p.grad._version for p in model.parameters() if p.grad is not None]
    for work in _micro_batches(model, own[:1], Deferral(model.modules()))[0]:
        work()
    after = [p.grad._version for p in model.parameters() if p.grad is not None]
    assert all(a < b for a, b in zip(before, after, strict=True)), "a write that is not counted is taken for none"


@pytest.mark.parametrize("case", STYLES)
def test_gradients_are_those_of_the_unsplit_layers(case: str) -> None:
    values(launch(_gradients, 2, case, torch.float64))


def test_main_gradients_are_float32() -> None:
    values(launch(_gradients, 2, "whole between", torch.bfloat16))


def _not_there() -> None:
    """A frozen weight, a hooked one, and torch.autograd.grad have the whole backward."""
    torch.manual_seed(0)
    model, last = Two(6).double(), nn.Linear(4, 4).double()
    model.up.weight.requires_grad_(False)
    plain, last_plain = copy.deepcopy((model, last))
    _divided(model, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model.down.weight.register_hook(lambda grad: grad * 2)
    deferral, x = Deferral([*model.modules(), last]), torch.randn(3, 4).double()
    with deferral:
        loss = last(model(x)).square().sum()
        (asked,) = torch.autograd.grad(loss, [model.down.bias], retain_graph=True)
        loss.backward()
    last_plain(plain(x)).square().sum().backward()
    assert len(deferral.take()) == 1  # of the last one
    down, up = (plain.down.weight.grad, plain.down.bias.grad), plain.up.bias.grad
    assert down[0] is not None and down[1] is not None and up is not None
    assert model.down.weight.grad is not None and model.up.bias.grad is not None
    assert torch.allclose(whole(asked), down[1], rtol=0, atol=1e-13)
    assert torch.allclose(whole(model.down.weight.grad), 2 * down[0], rtol=0, atol=1e-13)
    assert model.up.weight.grad is None
    assert torch.allclose(whole(model.up.bias.grad), up, rtol=0, atol=1e-13)


def test_what_cannot_wait() -> None:
    values(launch(_not_there, 2))
