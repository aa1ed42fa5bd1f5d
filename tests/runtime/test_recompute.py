"""Recomputation: the same bits with less kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pipekern as pk
from tests.runtime.models import KINDS, build
from tests.runtime.parity import same_bits
from tests.runtime.step import PLACES, run

HOW = pytest.mark.parametrize("how", ["selective", "full"])


class Counting(nn.Module):
    """A layer that counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.inner(x).tanh()


@HOW
def test_golden(how: str) -> None:
    """Two layers, three micro-batches: each runs once forward and once more in the backward."""
    net = nn.Sequential(Counting(), Counting())
    with pk.Pipeline(net, loss_fn=F.mse_loss, microbatches=3, ranks=2, recompute=how) as pipe:
        pipe.train_step(torch.randn(3, 4), torch.randn(3, 4))
        pipe.eval_step(torch.randn(3, 4))
    assert [layer.calls for layer in net] == [9, 9]


def _trained(ranks: int, kind: str, seed: int, schedule: str, how: str) -> tuple[Any, ...]:
    """Two steps, which add up; buffers and the user's random numbers after them."""
    model, data = build(kind, seed), KINDS[kind]
    options: dict[str, Any] = {"loss_fn": data.loss_fn, "microbatches": 4, "schedule": schedule, "recompute": how}
    torch.manual_seed(seed)
    batches = [data.batch(8) for _ in range(2)]
    with pk.Pipeline(model, ranks=ranks, seed=seed, **options) as pipe:
        losses = [pipe.train_step(*batch) for batch in batches]
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in pipe.named_parameters()}
        state = {name: value.clone() for name, value in pipe.state_dict().items()}
        return losses[0], losses[1], grads, state, torch.get_rng_state()


@HOW
@PLACES
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_the_same_bits_as_without(processes: bool, schedule: str, how: str, seed: int) -> None:
    """Of every kind of model: dropout draws the same masks, batch statistics count each micro-batch once."""
    for kind in KINDS:
        for plain, again in zip(
            *(run(processes, _trained, 2, kind, seed, schedule, choice) for choice in ("none", how)), strict=True
        ):
            assert same_bits(again, plain), kind


class Made(TorchDispatchMode):
    """Remembers the memory of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self) -> int:
        """Bytes that something still holds."""
        return sum(size for reference, size in self.storages.values() if not reference.expired())


class Wide(nn.Sequential):
    """One unit: a plain Sequential would be cut."""


def _kept(how: str) -> int:
    """Bytes that are held after the forward of a stage."""
    net = nn.Sequential(*(Wide(nn.Linear(32, 32), nn.Tanh(), nn.Softmax(-1), nn.Linear(32, 32)) for _ in range(3)))
    with pk.Pipeline(net, loss_fn=F.mse_loss, microbatches=1, ranks=1, recompute=how) as pipe, Made() as made:
        output = pipe._parts.stages[0].forward(0, torch.randn(64, 32, requires_grad=True), 0)
        kept = made.alive()
        pipe._parts.stages[0].backward(0, torch.ones_like(output))
    return kept


def test_each_keeps_less_than_the_one_before() -> None:
    none, selective, full = (_kept(how) for how in ("none", "selective", "full"))
    assert none > selective > full


def test_unknown_choice() -> None:
    with pytest.raises(pk.ConfigError, match="recompute='some'; choose one of 'none', 'selective', 'full'"):
        pk.Pipeline(nn.Linear(2, 2), loss_fn=F.mse_loss, microbatches=1, recompute="some")


class _Products(TorchDispatchMode):
    """Counts the forward products of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.linear.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("how", ["none", "selective"])
def test_products_are_made_once_whether_weight_work_waits_or_not(schedule: str, how: str) -> None:
    net = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(4)])
    pipe = pk.Pipeline(net, loss_fn=nn.MSELoss(), microbatches=3, ranks=2, schedule=schedule, recompute=how)
    x = torch.randn(6, 4)
    with _Products() as products:
        pipe.train_step(x, x)
    assert products.count == 3 * 4
