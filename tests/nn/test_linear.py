"""Weights of 16 bits with a gradient of 32."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import pipekern as pk
from pipekern.stage.deferral import Deferral

pytestmark = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="needs torch with Tensor.grad_dtype")
LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def test_golden() -> None:
    """257 = 1 + 256 is no bfloat16: the gradient keeps it, and the sum of two."""
    layer = pk.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    x = torch.tensor([[1.0], [256.0]], dtype=torch.bfloat16)
    for times in (1, 2):
        layer(x).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.dtype is torch.float32
        assert layer.weight.grad.item() == 257 * times


@LOW
@pytest.mark.parametrize("waiting", [False, True])
def test_the_product_is_not_rounded(dtype: torch.dtype, waiting: bool) -> None:
    """As close to float64 as float32 is, over two micro-batches, also where a stage puts the product off to W."""
    layer = pk.nn.Linear(64, 32, dtype=dtype)
    xs, dys = torch.randn(2, 48, 64).to(dtype), torch.randn(2, 48, 32).to(dtype)
    deferral = Deferral([layer] if waiting else [])
    for x, dy in zip(xs, dys, strict=True):
        x = x.requires_grad_()
        with deferral:
            layer(x).backward(dy)
        work = deferral.take()
        assert bool(work) == waiting
        for one in work:
            one()
        torch.testing.assert_close(x.grad, dy @ layer.weight)
    exact = sum(dy.double().T @ x.double() for x, dy in zip(xs, dys, strict=True))
    assert layer.weight.grad is not None and layer.weight.grad.dtype is torch.float32
    torch.testing.assert_close(layer.weight.grad.double(), exact, rtol=1e-5, atol=1e-5)
    assert layer.bias.grad is not None and layer.bias.grad.dtype is dtype


def test_w_writes_into_the_main_gradient() -> None:
    """No gradient of the weight's size is made in between: W adds to the memory that is there."""
    layer = pk.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    deferral = Deferral([layer])
    for _ in range(2):
        with deferral:
            layer(torch.randn(3, 4, dtype=torch.bfloat16)).sum().backward()
    first, second = deferral.take()
    first()
    memory = layer.weight.grad
    assert memory is not None
    place = memory.data_ptr()
    second()
    assert layer.weight.grad is memory and memory.data_ptr() == place


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, waiting: bool) -> None:
    """A float32 weight's gradient is that of ``nn.Linear``, to the bit; one of 16 bits has its own, unrounded."""
    layer, x, dy = pk.nn.Linear(64, 32, dtype=dtype), torch.randn(48, 64).bfloat16(), torch.randn(48, 32).bfloat16()
    deferral = Deferral([layer] if waiting else [])
    with deferral, torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    assert y.dtype is torch.bfloat16
    with deferral:
        y.backward(dy)
    for work in deferral.take():
        work()
    assert layer.weight.grad is not None and layer.weight.grad.dtype is torch.float32
    if dtype is torch.float32:
        assert torch.equal(layer.weight.grad, (dy.T @ x).float())
    else:
        torch.testing.assert_close(layer.weight.grad.double(), dy.double().T @ x.double(), rtol=1e-5, atol=1e-5)


def test_the_dtype_follows_the_weight() -> None:
    """Through conversion, loading and copying."""
    layer = pk.nn.Linear(2, 3)
    assert layer.weight.grad_dtype is torch.float32
    assert layer.to(torch.float16).weight.grad_dtype is torch.float32
    assert layer.double().weight.grad_dtype is torch.float64
    assert layer.bfloat16().weight.grad_dtype is torch.float32
    layer.load_state_dict({k: v.half() for k, v in layer.state_dict().items()}, assign=True)
    assert (layer.weight.dtype, layer.weight.grad_dtype) == (torch.float16, torch.float32)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    nn.Linear(2, 3).load_state_dict(torch.load(file))


def test_needs_the_dtype_of_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipekern.nn.linear.hasattr", lambda *_: False, raising=False)
    with pytest.raises(pk.ConfigError, match="grad_dtype"):
        pk.nn.Linear(2, 2)


@LOW
def test_in_a_pipeline(dtype: torch.dtype) -> None:
    """Whole backwards and those in two give the same float32 gradients."""
    model = nn.Sequential(*(layer for _ in range(3) for layer in (pk.nn.Linear(8, 8, dtype=dtype), nn.Tanh())))
    x, y = torch.randn(8, 8).to(dtype), torch.randn(8, 8).to(dtype)
    found = {}
    for schedule in ("1f1b", "zb-h1"):
        model.zero_grad()
        with pk.Pipeline(model, loss_fn=nn.MSELoss(), microbatches=4, ranks=2, schedule=schedule) as pipe:
            pipe.train_step(x, y)
        found[schedule] = [p.grad for p in model.parameters()]
    for (name, p), a, b in zip(model.named_parameters(), *found.values(), strict=True):
        assert a is not None and a.dtype is (torch.float32 if name.endswith("weight") else p.dtype)
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-3)
