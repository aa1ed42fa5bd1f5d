"""AdamW in one launch beside torch's optimizer, clipping and casts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipekern import ConfigError
from pipekern.kernels.adamw_step import adamw_step, hyper_row
from pipekern.kernels.grad_stats import grad_stats
from pipekern.kernels.table import Table

from .accuracy import DTYPES, close

SHAPES = ((3,), (40, 60), (0,), (2500,))


class Model:
    """Parameters with the state of an optimizer step."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, low: torch.dtype | None = None, **options: Any):
        self.params = [torch.randn(shape, device=device).to(dtype) for shape in SHAPES]
        self.grads = [torch.zeros(shape, device=device) for shape in SHAPES]
        self.moments = [[torch.zeros(shape, device=device) for shape in SHAPES] for _ in range(2)]
        self.copies = [torch.zeros(shape, device=device, dtype=low) for shape in SHAPES] if low else []
        columns = (self.params, self.grads, *self.moments, *([self.copies] if low else []))
        self.table = Table(*columns, groups=options.pop("groups", ()))
        self.hyper = torch.tensor(options.pop("rows", None) or [hyper_row(**{"lr": 1e-2, **options})], device=device)
        self.progress = torch.zeros(2, dtype=torch.int32, device=device)

    def step(self, grads: list[Tensor], **options: Any) -> None:
        for own, grad in zip(self.grads, grads, strict=True):
            own.copy_(grad)
        adamw_step(self.table, self.hyper, self.progress, grad_stats(Table(self.grads)), **options)

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.moments[0], *self.moments[1], *self.copies]


def draw(device: str) -> list[Tensor]:
    return [torch.randn(shape, device=device) for shape in SHAPES]


def test_golden(device: str) -> None:
    """The first step moves by the learning rate against the gradient's sign, and decays by lr · weight_decay."""
    param, grad = torch.tensor([2.0, -2.0], device=device), torch.tensor([0.5, -3.0], device=device)
    table = Table([param], [grad], [torch.zeros(2, device=device)], [torch.zeros(2, device=device)])
    progress = torch.zeros(2, dtype=torch.int32, device=device)
    adamw_step(table, torch.tensor([hyper_row(lr=0.1, weight_decay=0.5)], device=device), progress)
    assert param.tolist() == pytest.approx([2 * 0.95 - 0.1, -2 * 0.95 + 0.1], rel=1e-6)
    assert progress.tolist() == [1, 0]


@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95)])
def test_as_torch(max_norm: float, betas: tuple[float, float], device: str) -> None:
    """Four steps with clipping and decay, parameters and moments, against float64 and torch in float32."""
    model = Model(device, max_norm=max_norm, betas=betas, lr=1e-2, weight_decay=0.1)
    start = [param.clone() for param in model.params]
    steps = [draw(device) for _ in range(4)]
    for grads in steps:
        model.step(grads)
    runs = []
    for dtype in (torch.float32, torch.float64):
        params = [nn.Parameter(param.to(dtype)) for param in start]
        optimizer = torch.optim.AdamW(params, lr=1e-2, betas=betas, weight_decay=0.1)
        for grads in steps:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.to(dtype)
            nn.utils.clip_grad_norm_(params, max_norm)
            optimizer.step()
        state = [optimizer.state[param] for param in params]
        runs.append([*(p.detach() for p in params), *(s["exp_avg"] for s in state), *(s["exp_avg_sq"] for s in state)])
    for ours, theirs, exact in zip(model.tensors(), *runs, strict=True):
        close(ours, theirs, exact)
    assert model.progress.tolist() == [4, 0]


@pytest.mark.parametrize("step", [1, 3, 100, 2000, 100000])
def test_bias_correction_keeps_its_digits(step: int, device: str) -> None:
    """1 − 0.999ᵗ from the logarithm: β₂ itself in float32 would be off in the fifth digit."""
    param, grad = torch.zeros(1, device=device), torch.ones(1, device=device)
    table = Table([param], [grad], [torch.zeros(1, device=device)], [torch.zeros(1, device=device)])
    progress = torch.tensor([step - 1, 0], dtype=torch.int32, device=device)
    adamw_step(table, torch.tensor([hyper_row(lr=1.0, eps=0.0, weight_decay=0.0)], device=device), progress)
    mean, root = 0.1 / (1 - 0.9**step), math.sqrt(0.001 / -math.expm1(step * math.log(0.999)))
    assert param.item() == pytest.approx(-mean / root, rel=1e-6)


@pytest.mark.parametrize("low", DTYPES[1:])
def test_copies_and_zeroed_gradients(low: torch.dtype, device: str) -> None:
    model = Model(device, low=low)
    model.step(draw(device), zero_grads=True)
    assert all(torch.equal(copy, param.to(low)) for copy, param in zip(model.copies, model.params, strict=True))
    assert not any(grad.any() for grad in model.grads)


def test_groups(device: str) -> None:
    """A row of hyper for each group: the second does not move."""
    model = Model(device, groups=[0, 1, 0, 1], rows=[hyper_row(0.1), hyper_row(0.0)])
    before = [param.clone() for param in model.params]
    model.step(draw(device))
    same = [torch.equal(a, b) for a, b in zip(model.params, before, strict=True)]
    assert same == [False, True, True, True]  # the third is empty


def test_the_loss_scale_and_the_norm_of_other_ranks(device: str) -> None:
    """Scaled gradients give the same bits; rows of stats that others own count in the norm."""
    grads = draw(device)
    plain, scaled = (Model(device, max_norm=1.0) for _ in range(2))
    for a, b in zip(plain.params, scaled.params, strict=True):
        b.copy_(a)
    plain.step(grads)
    scaled.step([64 * grad for grad in grads], grad_scale=torch.tensor([64.0], device=device))
    for a, b in zip(plain.tensors(), scaled.tensors(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=0)
    moved = Model(device, max_norm=1.0)
    stats = torch.tensor([[9.0, 0.0], [16.0, 0.0]], device=device)
    for own, grad in zip(moved.grads, grads, strict=True):
        own.copy_(grad)
    adamw_step(moved.table, moved.hyper, moved.progress, stats)
    close(moved.moments[0][1], grads[1] * 0.1 / 5, grads[1].double() * 0.1 / (5 + 1e-6))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_skipped_on_the_device(value: float, zero: bool, device: str) -> None:
    """One value that is not finite: nothing moves, the step does not count, gradients are zeroed all the same."""
    model = Model(device, low=torch.bfloat16)
    before = [t.clone() for t in model.tensors()]
    grads = draw(device)
    grads[3][7] = value
    model.step(grads, zero_grads=zero)
    assert all(map(torch.equal, model.tensors(), before))
    assert model.progress.tolist() == [0, 0]
    assert zero == (not any(grad.any() for grad in model.grads))
    model.step(draw(device))
    assert model.progress.tolist() == [1, 0]


def test_a_norm_that_overflows_skips_the_step(device: str) -> None:
    """All values are finite, their squares' sum is not: clipped, every gradient would be zero."""
    model = Model(device, max_norm=1.0)
    before = [t.clone() for t in model.tensors()]
    model.step([grad * 1e20 for grad in draw(device)])
    assert all(map(torch.equal, model.tensors(), before))
    assert model.progress.tolist() == [0, 0]


def test_bfloat16_parameters_rounded_at_random(device: str) -> None:
    """Steps of a hundredth of the last place: rounding to the nearest loses all of them, this keeps their mean."""
    size = 6000
    columns = [[torch.ones(size, device=device)] for _ in range(4)]
    columns[0] = [columns[0][0].bfloat16()]
    columns[2][0].zero_()
    columns[3][0].zero_()
    rate = 2.0**-8 / 8
    progress = torch.zeros(2, dtype=torch.int32, device=device)
    hyper = torch.tensor([hyper_row(lr=rate, weight_decay=0.0)], device=device)
    adamw_step(Table(*columns), hyper, progress, stochastic_rounding=True)
    param = columns[0][0].double()
    assert set(param.unique().tolist()) == {1.0, 1.0 - 2.0**-8}
    deviation = 2.0**-8 * math.sqrt(1 / 8 * 7 / 8 / size)
    assert param.mean().item() == pytest.approx(1 - rate, abs=5 * deviation)


def test_refused(device: str) -> None:
    model = Model(device)
    with pytest.raises(ConfigError, match=r"hyper is \(8,\)"):
        adamw_step(model.table, model.hyper[0], model.progress)
    with pytest.raises(ConfigError, match="two zeros of int32 at first"):
        adamw_step(model.table, model.hyper, model.progress.float())
    zeros = torch.zeros(4, 3, device=device)
    for stats in (zeros[:, :2].double(), zeros[:, 0], zeros[:, 1:]):
        with pytest.raises(ConfigError, match=r"stats is .*\[n, 2\] of float32, contiguous"):
            adamw_step(model.table, model.hyper, model.progress, stats)
    with pytest.raises(ConfigError, match="leave it out"):
        adamw_step(model.table, model.hyper, model.progress, stochastic_rounding=True)
    low = [grad.bfloat16() for grad in model.grads]
    with pytest.raises(ConfigError, match="they must be float32"):
        adamw_step(Table(model.params, model.grads, low, low), model.hyper, model.progress)
