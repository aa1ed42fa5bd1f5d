"""A stage's forward and backward, against autograd on the same units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pipekern.errors import ConfigError
from pipekern.stage.random import unit_keys
from pipekern.stage.stage import Stage, detached
from pipekern.stage.unit import cut

CPU = torch.device("cpu")


def _stage(*layers: nn.Module, microbatches: int = 4) -> Stage:
    root, units = cut(nn.Sequential(*layers).double(), seed=0)
    stage = Stage(1, root, units, CPU, unit_keys(0, range(microbatches), range(len(units))))
    stage.begin()
    return stage


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_golden() -> None:
    """y = 3x: from dL/dy = 5 follow dL/dx = 15 and dL/dw = 5x."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 3.0)
    stage = _stage(layer)
    x = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    y = stage.forward(0, x, step_key=0)
    assert y.item() == 6.0
    assert stage.backward(0, torch.tensor([[5.0]], dtype=torch.float64)).item() == 15.0
    assert layer.weight.grad is not None
    assert layer.weight.grad.item() == 10.0
    assert x.grad is None  # handed out, not kept


def test_microbatches_in_any_order_add_up(seed: int) -> None:
    layers = [nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)]
    stage = _stage(*layers)
    inputs, grads = [_leaf(2, 3) for _ in range(4)], [torch.randn(2, 3, dtype=torch.float64) for _ in range(4)]
    outputs = [stage.forward(i, inputs[i], 0) for i in (0, 1, 2)]
    returned = {i: stage.backward(i, grads[i]) for i in (2, 0)}
    outputs.append(stage.forward(3, inputs[3], 0))
    returned |= {i: stage.backward(i, grads[i]) for i in (3, 1)}
    got = [p.grad for p in stage.parameters()]
    want = torch.autograd.grad(outputs_of(layers, inputs), [*inputs, *stage.parameters()], grads)
    assert all(torch.equal(returned[i], want[i]) for i in range(4))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(got, want[4:], strict=True) if a is not None)
    assert None not in got


def outputs_of(layers: list[nn.Module], inputs: list[Tensor]) -> list[Tensor]:
    """The plain model."""
    model = nn.Sequential(*layers)
    return [model(x) for x in inputs]


class Fork(nn.Module):
    """Several outputs, one of which needs no gradient and one of which nobody will use."""

    def forward(self, value: dict[str, Any]) -> Any:
        x, flag = value["x"], value["flag"]
        return {"twice": x * 2, "flag": not flag, "inner": [x.detach(), (x.sin(), None)]}


def test_nested_values_give_and_take_one_gradient_a_leaf() -> None:
    """In the order of the leaves that require one; None where no gradient came or none is due."""
    stage = _stage(Fork())
    x, other = _leaf(2, 3), _leaf(4)
    output = stage.forward(0, {"x": x, "flag": True, "other": other}, 0)
    assert output["flag"] is False
    assert [t.requires_grad for t in pytree.tree_leaves(output) if isinstance(t, Tensor)] == [True, False, True]
    grad = torch.randn(2, 3, dtype=torch.float64)
    got = stage.backward(0, [None, grad])
    assert torch.equal(got[0], grad * x.cos())
    assert got[1] is None


def test_without_gradients_nothing_is_returned() -> None:
    """An input of integers: the stage learns, and sends nothing back."""
    layer = nn.Embedding(5, 3)
    stage = _stage(layer)
    stage.forward(0, torch.tensor([1, 4]), 0)
    assert stage.backward(0, torch.ones(2, 3, dtype=torch.float64)) is None
    assert layer.weight.grad is not None
    assert layer.weight.grad.sum() == 6
    frozen = _stage(nn.Linear(3, 3).requires_grad_(False))
    output = frozen.forward(0, torch.ones(2, 3, dtype=torch.float64), 0)
    assert not output.requires_grad
    assert frozen.backward(0, None) is None


def test_the_loss_is_the_end_of_the_last_stage() -> None:
    stage = _stage(nn.Linear(3, 3))
    x = _leaf(2, 3)
    loss = stage.forward(0, x, 0, lambda output: output.square().sum())
    assert loss.dim() == 0
    got = stage.backward(0, torch.tensor(0.5, dtype=torch.float64))
    (want,) = torch.autograd.grad(outputs_of([stage.units[0].train], [x])[0].square().sum() * 0.5, x)
    assert torch.allclose(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), nn.ELU(inplace=True), nn.Dropout(0.5, inplace=True)], ids=str)
def test_units_that_write_in_place_leave_what_was_received(layer: nn.Module) -> None:
    stage = _stage(layer, nn.Linear(3, 3))
    x = _leaf(2, 3)
    before = x.detach().clone()
    stage.forward(0, x, 0)
    assert torch.equal(x.detach(), before)
    assert stage.backward(0, torch.ones(2, 3, dtype=torch.float64)).shape == x.shape


class Positions(nn.Module):
    """Its gradients are views of what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one.view(1, 3) + self.two.view(1, 3)


def test_gradients_share_no_memory_with_what_travels() -> None:
    """Neither with the gradient that came, nor with the one that goes on, nor with each other."""
    stage = _stage(Positions())
    x, grad = _leaf(1, 3), torch.ones(1, 3, dtype=torch.float64)
    stage.forward(0, x, 0)
    returned = stage.backward(0, grad)
    grads = [p.grad for p in stage.parameters() if p.grad is not None]
    memory = [t.untyped_storage().data_ptr() for t in (grad, returned, *grads)]
    assert len(set(memory[2:])) == 2
    assert not set(memory[:2]) & set(memory[2:])


def test_random_numbers_depend_on_step_microbatch_and_unit() -> None:
    """And not on what ran before."""
    stage = _stage(nn.Dropout(0.5), nn.Dropout(0.5))
    x = torch.ones(8, 8, dtype=torch.float64)
    first = stage.forward(0, x, 5)
    others = [stage.forward(1, x, 5), stage.forward(0, x, 6)]
    torch.rand(100)
    assert torch.equal(stage.forward(0, x, 5), first)
    assert not any(torch.equal(other, first) for other in others)
    kept = (first != 0).double().mean()
    assert kept < 0.4, "both layers dropped the same entries"


def test_clear_forgets_every_microbatch() -> None:
    stage = _stage(nn.Linear(3, 3))
    stage.forward(2, _leaf(2, 3), 0)
    stage.clear()
    with pytest.raises(KeyError):
        stage.backward(2, torch.ones(2, 3, dtype=torch.float64))


def test_detached_cuts_the_graph_and_keeps_who_wants_a_gradient() -> None:
    x = _leaf(2)
    value = detached({"a": x * 2, "b": (x.detach(), 3, None), "c": torch.tensor([1, 2])})
    assert value["a"].is_leaf
    assert value["a"].requires_grad
    assert not value["b"][0].requires_grad
    assert value["b"][1:] == (3, None)
    assert not value["c"].requires_grad


class Hidden(nn.Module):
    """Writes into its input, and nothing of it says so."""

    def forward(self, x: Tensor) -> Tensor:
        exec("x.mul_(2)", {"x": x})
        return x


def test_a_hidden_write_into_the_input_is_refused_with_the_mend() -> None:
    stage = _stage(Hidden())
    with pytest.raises(ConfigError, match=r"stage 1 writes into its input in place.*`inplace = True`"):
        stage.forward(0, _leaf(2, 3), 0)
    layer = Hidden()
    layer.inplace = True  # type: ignore[assignment]  # the mend
    x = _leaf(2, 3)
    told = _stage(layer)
    assert torch.equal(told.forward(0, x, 0), 2 * x)
    assert torch.equal(told.backward(0, torch.ones(2, 3, dtype=torch.float64)), torch.full_like(x, 2.0))


def test_weight_work_waits_and_counts_as_held() -> None:
    """B frees the graph and keeps the micro-batch; W adds the weight gradient, in any order, once."""
    layer = nn.Linear(3, 3)
    root, units = cut(nn.Sequential(layer).double(), seed=0)
    stage = Stage(0, root, units, CPU, unit_keys(0, range(2), range(1)), defers=True)
    stage.begin()
    inputs = [_leaf(2, 3), _leaf(2, 3)]
    for i, x in enumerate(inputs):
        stage.forward(i, x, 0)
    assert stage.live == 2
    for i in (0, 1):
        stage.backward_input(i, torch.ones(2, 3, dtype=torch.float64))
    assert stage.live == 2 and layer.weight.grad is None
    stage.backward_weight(1)
    assert torch.equal(layer.weight.grad, inputs[1].detach().sum(0).expand(3, 3))  # type: ignore[arg-type]
    stage.backward_weight(0)
    assert stage.live == 0
    torch.testing.assert_close(layer.weight.grad, (inputs[0] + inputs[1]).detach().sum(0).expand(3, 3))
    with pytest.raises(KeyError):
        stage.backward_weight(0)
