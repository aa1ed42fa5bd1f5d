"""The loss of a linear layer beside torch's two modules."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipekern import ConfigError
from pipekern.kernels import linear_cross_entropy as module
from pipekern.kernels.language import INTERPRETED
from pipekern.kernels.linear_cross_entropy import linear_cross_entropy

from .accuracy import DTYPES, close, compare
from .test_cross_entropy import torch_loss

pytestmark = pytest.mark.skipif(INTERPRETED, reason="has no kernel of its own")


def torch_linear_loss(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options: Any) -> Tensor:
    return torch_loss(F.linear(x, weight, bias), target, **options)


def own_loss(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options: Any) -> Tensor:
    return linear_cross_entropy(x, weight, target, bias=bias, **options)


def tensors(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias = (torch.randn(*s, device=device).to(dtype) for s in ((3, 7, 16), (40, 16), (40,)))
    target = torch.randint(40, (3, 7), device=device)
    target[1, 2:5] = -100
    return x, weight, bias, target


def test_golden(device: str) -> None:
    """Logits (1, 1): log 2, and the gradient of the first is 1/2 − 1."""
    x = torch.tensor([[1.0]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0], [1.0]], device=device, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.tensor([0], device=device))
    loss.backward()
    assert weight.grad is not None
    assert loss.item() == pytest.approx(0.693147, rel=1e-6)
    assert weight.grad.flatten().tolist() == pytest.approx([-0.5, 0.5], rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scratch", [1, 700, 2**28])
def test_as_torch(
    dtype: torch.dtype, reduction: str, scratch: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, in chunks, at once; gradients of the loss other than 1; with and without bias."""
    monkeypatch.setattr(module, "SCRATCH", scratch)
    x, weight, bias, target = tensors(device, dtype)
    smooth: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3}
    for options in ({}, smooth):
        own = partial(own_loss, target=target, reduction=reduction, **options)
        theirs = partial(torch_linear_loss, target=target, reduction=reduction, **options)
        compare(own, theirs, x, weight, bias)
        compare(own, theirs, x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad(dtype: torch.dtype, device: str) -> None:
    """Added to what is there, in float32; two micro-batches under a loss scale, and the weight used twice."""
    x, weight, _, target = tensors(device, dtype)
    weight.requires_grad_()
    before = torch.randn(40, 16, device=device)
    main_grad, scale, count = before.clone(), torch.tensor(4.0, device=device), torch.tensor(30, device=device)
    exact = before.double()
    plain = before.clone()
    for part in (slice(0, 2), slice(1, 3)):
        leaf = x[part].clone().requires_grad_()
        options = {"denominator": count, "main_grad": main_grad, "grad_scale": scale}
        loss = linear_cross_entropy(leaf, weight, target[part], **options)
        (dx,) = torch.autograd.grad(loss, leaf, scale)
        assert dx.isfinite().all()
        for dtype_of, total in ((torch.float64, exact), (dtype, plain)):
            w = weight.detach().to(dtype_of).requires_grad_()
            want = torch_linear_loss(x[part].to(dtype_of), w, None, target[part], reduction="sum") / 30
            total += torch.autograd.grad(want, w, torch.tensor(4.0, dtype=want.dtype, device=device))[0]
    close(main_grad, plain, exact)


def test_a_gradient_that_was_not_announced_is_nan(device: str) -> None:
    """The weight's gradient is in main_grad by then, with another scale: nothing may go on with that unseen."""
    x, weight, _, target = tensors(device)
    x.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, target, main_grad=torch.zeros(40, 16, device=device))
    assert torch.autograd.grad(loss, x, torch.tensor(2.0, device=device))[0].isnan().all()


def test_without_gradients_nothing_is_made(device: str) -> None:
    x, weight, _, target = tensors(device)
    weight.requires_grad_()
    main_grad = torch.zeros(40, 16, device=device)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, target, main_grad=main_grad)
    assert loss.item() == pytest.approx(torch_linear_loss(x, weight, None, target).item(), rel=1e-5)
    assert not main_grad.any()


def test_every_token_ignored_and_none_there(device: str) -> None:
    x, weight, bias, target = tensors(device)
    for tokens in (x, x[:, :0]):
        x, w, b = leaves = [t.clone().requires_grad_() for t in (tokens, weight, bias)]
        loss = own_loss(x, w, b, torch.full_like(target, -100)[:, : tokens.shape[1]])
        grads = torch.autograd.grad(loss, leaves)
        assert loss.item() == 0
        assert not any(grad.any() for grad in grads)


def test_again_over_a_kept_graph(device: str) -> None:
    x, weight, bias, target = tensors(device)
    weight.requires_grad_()
    loss = own_loss(x, weight, bias, target)
    first, second = (torch.autograd.grad(loss, weight, torch.full_like(loss, v), retain_graph=True) for v in (1.0, 0.5))
    assert torch.equal(first[0], 2 * second[0])


def test_autocast(device: str) -> None:
    """Products in the dtype of autocast, as of a linear layer; gradients in the dtypes of what was given."""
    x, weight, bias, target = tensors(device)
    weight.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        loss = own_loss(x, weight, bias, target)
    (grad,) = torch.autograd.grad(loss, weight)
    assert torch.equal(loss, own_loss(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), target))
    assert grad.dtype == torch.float32


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return result


def test_never_all_logits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCRATCH", 4096)
    x = torch.randn(200, 4, device=device, requires_grad=True)
    weight = torch.randn(256, 4, device=device, requires_grad=True)
    target = torch.randint(256, (200,), device=device)
    with Largest() as seen:
        linear_cross_entropy(x, weight, target).backward()
    assert seen.bytes <= 4096


def test_chunks_are_even_and_fit() -> None:
    """T = 8192, V = 128256, bfloat16: eight chunks of 1024 rows."""
    assert module._chunk(8192, 128256, 2) == 1024
    for tokens in (1, 127, 129, 5000, 8192, 100000):
        for vocabulary in (2, 32000, 128256, 10**6):
            rows = module._chunk(tokens, vocabulary, 2)
            assert rows >= 1
            assert rows * vocabulary * 2 <= module.SCRATCH or rows == 1


def test_refused(device: str) -> None:
    x, weight, _, target = tensors(device)
    with pytest.raises(ConfigError, match='reduction="none" needs'):
        linear_cross_entropy(x, weight, target, reduction="none")
    with pytest.raises(ConfigError, match=r"they must be \[..., H\], \[V, H\], \[V\]"):
        linear_cross_entropy(x, weight.T, target)
    with pytest.raises(ConfigError, match="leave it out"):
        linear_cross_entropy(x, weight, target, grad_scale=torch.ones((), device=device))
    with pytest.raises(ConfigError, match=r"main_grad is \(16, 40\)"):
        linear_cross_entropy(x, weight, target, main_grad=torch.zeros(16, 40, device=device))
