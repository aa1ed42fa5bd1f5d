"""One norm out of partial ones."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import pytest
import torch
from torch import Tensor, nn

from pipekern.optim import clip

KINDS = pytest.mark.parametrize("kind", [1.0, 2.0, 3.5, math.inf])


def _parameter(grad: Tensor | None) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros_like(grad) if grad is not None else torch.zeros(2))
    parameter.grad = grad
    return parameter


def _norm(parameters: dict[int, nn.Parameter], kind: float = 2.0) -> tuple[Tensor, int]:
    return clip.total_norm([clip.partials(parameters, kind)], kind)


def test_golden() -> None:
    """Gradients (3) and (0, 4) have the norm 5; clipped to 1 they are 0.6 and 0.8."""
    parameters = {0: _parameter(torch.tensor([3.0])), 1: _parameter(torch.tensor([0.0, 4.0]))}
    total, bad = _norm(parameters)
    assert (total.item(), total.dtype, total.dim(), bad) == (5.0, torch.float64, 0, -1)
    clip.scale(parameters.values(), 1.0, total)
    grads = [p.grad.tolist() for p in parameters.values() if p.grad is not None]
    assert grads[0] == pytest.approx([0.6], rel=1e-5)
    assert grads[1] == pytest.approx([0.0, 0.8], rel=1e-5)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_to_torch(kind: float, dtype: torch.dtype) -> None:
    grads = [torch.randn(size, dtype=dtype) for size in (3, 50, 1, 7)]
    ours, theirs = ([_parameter(grad.clone()) for grad in grads] for _ in range(2))
    total, bad = _norm(dict(enumerate(ours)), kind)
    want = nn.utils.clip_grad_norm_(theirs, 0.5, kind)
    assert bad == -1
    assert total.item() == pytest.approx(want.item(), rel=1e-6)
    clip.scale(ours, 0.5, total)
    pairs = [(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)]
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in pairs if a is not None and b is not None)


@KINDS
def test_the_same_bits_for_every_split(kind: float) -> None:
    """Whoever holds which parameters, in whatever order ranks tell."""
    parameters = {i: _parameter(torch.randn(5) * 10.0 ** (i - 4)) for i in range(9)}
    want = _norm(parameters, kind)[0]
    for cuts in ((1, 2), (3, 8), (0, 9), (4, 4)):
        bounds = [0, *cuts, 9]
        parts = [range(a, b) for a, b in pairwise(bounds)]
        for order in permutations(parts):
            rows = [clip.partials({i: parameters[i] for i in reversed(part)}, kind) for part in order]
            assert torch.equal(clip.total_norm(rows, kind)[0], want)


def test_below_the_limit_and_without_gradients_nothing_changes() -> None:
    grad = torch.tensor([0.3, 0.4])
    parameter = _parameter(grad.clone())
    clip.scale([parameter, _parameter(None)], 1.0, _norm({0: parameter, 1: _parameter(None)})[0])
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, grad)
    total, bad = clip.total_norm([clip.partials({}, 2.0), clip.partials({3: _parameter(None)}, 2.0)], 2.0)
    assert (total.item(), bad) == (0.0, -1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_gradient_that_is_not_finite_is_named(value: float) -> None:
    parameters = {i: _parameter(torch.ones(3)) for i in (9, 4, 7, 2)}
    for i in (9, 4):
        parameters[i].grad = torch.tensor([1.0, value, 0.0])
    assert _norm(parameters)[1] == 4


def test_large_gradients_do_not_overflow_their_dtype() -> None:
    """Squares of half-precision gradients are summed in float32."""
    total, bad = _norm({0: _parameter(torch.full((4,), 300.0, dtype=torch.float16))})
    assert (total.item(), bad) == (600.0, -1)
