"""The losses beside torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from tests.kernels.accuracy import DTYPES, compare

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1, "ignore_index": 3},
    {"reduction": "sum"},
    {"reduction": "none"},
]


def test_golden() -> None:
    """Two logits of 0: log 2."""
    assert pk.nn.CrossEntropyLoss()(torch.zeros(1, 2), torch.tensor([1])).item() == pytest.approx(0.6931472)
    loss = pk.nn.LinearCrossEntropyLoss(3, 2)
    assert loss(torch.zeros(4, 3), torch.tensor([0, 1, 1, 0])).item() == pytest.approx(0.6931472)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(9,), (6, 9), (4, 9, 5)], ids=str)
def test_cross_entropy(shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype) -> None:
    logits = 3 * torch.randn(shape)
    target = torch.randint(0, 9, shape[:1] if len(shape) == 2 else shape[:1] + shape[2:] if shape[1:] else ())
    ours, theirs = pk.nn.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    assert repr(ours) == repr(theirs)
    compare(lambda x: ours(x, target).to(x.dtype), lambda x: theirs(x, target), logits.to(dtype))


def test_what_torch_does_alone() -> None:
    weight, x = torch.rand(9), torch.randn(6, 9)
    target, shares = torch.randint(0, 9, (6,)), torch.rand(6, 9).softmax(-1)
    cases: list[tuple[Tensor, dict[str, Any]]] = [(target, {"weight": weight}), (shares, {})]
    for y, options in cases:
        assert torch.equal(pk.nn.CrossEntropyLoss(**options)(x, y), nn.CrossEntropyLoss(**options)(x, y))
        with pytest.raises(pk.ConfigError, match="z_loss"):
            pk.nn.CrossEntropyLoss(**options, z_loss=1.0)(x, y)


def test_z_loss() -> None:
    x, target = torch.randn(6, 9, dtype=torch.float64), torch.randint(0, 9, (6,))
    plain = nn.CrossEntropyLoss()(x, target)
    wanted = plain + 0.5 * x.logsumexp(-1).square().mean()
    torch.testing.assert_close(pk.nn.CrossEntropyLoss(z_loss=0.5)(x, target), wanted, rtol=1e-12, atol=0)


def test_nothing_counts() -> None:
    x = torch.randn(3, 9, requires_grad=True)
    loss = pk.nn.CrossEntropyLoss()(x, torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0 and x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy(bias: bool, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Names and results of a linear layer and torch's loss; torch 2.13 has a module with these names, too."""
    ours, product = pk.nn.LinearCrossEntropyLoss(5, 9, bias=bias, **options), nn.Linear(5, 9, bias)
    assert [*ours.state_dict()] == ["linear.weight", "linear.bias"][: 1 + bias]
    loss, target = nn.CrossEntropyLoss(**options), torch.randint(0, 9, (6,))
    names = [name for name, _ in product.named_parameters()]

    def run(module: nn.Module, prefix: str, *rest: Tensor) -> Any:
        def call(x: Tensor, *values: Tensor) -> Tensor:
            weights = {prefix + name: value for name, value in zip(names, values, strict=True)}
            result: Tensor = torch.func.functional_call(module, weights, (x, *rest))
            return result.to(x.dtype) if rest else loss(result, target)

        return call

    weights = [p.detach().to(dtype) for p in product.parameters()]
    compare(run(ours, "linear.", target), run(product, ""), torch.randn(6, 5).to(dtype), *weights)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch has it from 2.13 on")
def test_loads_torchs_state() -> None:
    theirs = nn.LinearCrossEntropyLoss(5, 9, bias=True)
    ours = pk.nn.LinearCrossEntropyLoss(5, 9, bias=True)
    ours.load_state_dict(theirs.state_dict())
    x, target = torch.randn(6, 5), torch.randint(0, 9, (6,))
    torch.testing.assert_close(ours(x, target), theirs(x, target))
