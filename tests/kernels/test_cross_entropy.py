"""Cross entropy beside torch's, and where others go wrong."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipekern import ConfigError
from pipekern.kernels.cross_entropy import cross_entropy

from .accuracy import DTYPES, VIEWS, close, compare, views


def torch_loss(logits: Tensor, target: Tensor, *, z_loss: float = 0.0, **options: Any) -> Tensor:
    """torch's, of logits in float32 at least, as losses are."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide.flatten(0, -2), target.flatten().long(), **options)
    kept = target != options.get("ignore_index", -100)
    squares = z_loss * wide.logsumexp(-1).square() * kept
    if options.get("reduction") == "none":
        return (loss + squares.flatten()).view(target.shape)
    return loss + squares.sum() / (kept.sum() if options.get("reduction", "mean") == "mean" else 1)


def beside_torch(logits: Tensor, target: Tensor, grads: tuple[Tensor, ...] = (), **options: Any) -> None:
    ours, theirs = partial(cross_entropy, target=target, **options), partial(torch_loss, target=target, **options)
    compare(ours, theirs, logits, grads=grads)


def test_golden(device: str) -> None:
    """Two equal logits: log 2; targets that are ignored do not count."""
    logits = torch.tensor([[0.0, 0.0], [3.0, 1.0]], device=device, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, -100], device=device))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([0.5, -0.5, 0.0, 0.0], rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "reduction"), [(1, "mean"), (33, "none"), (33, "sum"), (9000, "mean")])
def test_as_torch(dtype: torch.dtype, classes: int, reduction: str, device: str) -> None:
    """Gradients of the loss other than 1, too; a third of the targets ignored."""
    logits = 3 * torch.randn(2, 5, classes, device=device).to(dtype)
    target = torch.randint(classes, (2, 5), device=device)
    target[:, 1::3] = -1
    beside_torch(logits, target, reduction=reduction, ignore_index=-1)
    beside_torch(logits, target, reduction=reduction, ignore_index=-1, label_smoothing=0.2, z_loss=1e-2)


@pytest.mark.parametrize(
    ("dtype", "stride"),
    [(torch.float32, 8203), (torch.bfloat16, 8203), (torch.bfloat16, 8204), (torch.float16, 8216)],
)
def test_rows_that_begin_anywhere(dtype: torch.dtype, stride: int, device: str) -> None:
    """An odd number of classes: rows are read from their first multiple of 16 bytes on, what is before it last."""
    memory = 3 * torch.randn(5, stride, device=device).to(dtype)
    logits, target = memory[:, :8203], torch.tensor([0, 8202, 5, -100, 8196], device=device)
    beside_torch(logits, target)
    beside_torch(logits, target, label_smoothing=0.2, z_loss=1e-2)
    want = torch.autograd.grad(cross_entropy(logits.requires_grad_(), target), logits)[0]
    leaf = memory.detach().clone().requires_grad_()
    row = (leaf * 1)[:, :8203]  # a copy that is the loss's own
    cross_entropy(row, target, overwrite=True).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[:, :8203], want)


@pytest.mark.parametrize("gap", [1.0, 8.0, 14.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_confident_logits(gap: float, offset: float, device: str) -> None:
    """Every digit of a small loss and of its gradient, which a difference from the log of the sum does not have."""
    target = torch.arange(4, device=device)
    logits = torch.randn(4, 300, device=device) + offset
    logits[range(4), target] += gap
    logits.requires_grad_()
    loss = cross_entropy(logits, target, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    want = F.cross_entropy(exact, target, reduction="none")
    (exact_grad,) = torch.autograd.grad(want.sum(), exact)
    assert loss.tolist() == pytest.approx(want.tolist(), rel=1e-5)
    assert grad[range(4), target].tolist() == pytest.approx(exact_grad[range(4), target].tolist(), rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_target_ignored(reduction: str, device: str) -> None:
    logits = torch.randn(3, 7, device=device, requires_grad=True)
    loss = cross_entropy(logits, torch.full((3,), -100, device=device), reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert not loss.any()
    assert not grad.any()


def test_smoothing_and_z_loss_of_nought_are_off(device: str) -> None:
    """A forbidden class is −inf: times 0 it would be NaN."""
    logits = torch.randn(3, 7, device=device)
    logits[:, 5] = -math.inf
    target = torch.tensor([0, 1, 2], device=device)
    beside_torch(logits, target)
    assert math.isfinite(cross_entropy(logits, target, label_smoothing=0.0, z_loss=0.0).item())


def test_a_class_that_is_not_there(device: str) -> None:
    logits = torch.randn(3, 7, device=device, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, 7, -2], device=device), reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isnan().tolist() == [False, True, True]
    assert grad.isnan().any(1).tolist() == [False, True, True]


def test_denominator(device: str) -> None:
    """The count of all micro-batches, in device memory, of any dtype."""
    logits, target = torch.randn(3, 7, device=device, requires_grad=True), torch.tensor([0, 1, -100], device=device)
    (want,) = torch.autograd.grad(cross_entropy(logits, target, reduction="sum"), logits)
    for count in (torch.tensor(8, device=device), torch.tensor([8.0], device=device)):
        loss = cross_entropy(logits, target, denominator=count)
        assert torch.equal(torch.autograd.grad(loss, logits)[0], want / 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_overwrite(dtype: torch.dtype, device: str) -> None:
    """The gradient lies where the logits were, with the same bits; a second backward is refused by torch."""
    leaf = torch.randn(4, 50, device=device).to(dtype).requires_grad_()
    target = torch.randint(50, (4,), device=device)
    (want,) = torch.autograd.grad(cross_entropy(leaf, target), leaf)
    logits = leaf.clone()
    loss = cross_entropy(logits, target, overwrite=True)
    (got,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(got, want)
    assert got.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("name", VIEWS)
def test_any_strides(name: str, device: str) -> None:
    """Logits, targets (int64 that are not 16-byte aligned) and the gradient of the loss."""
    logits = views(3, 4, 40, dtype=torch.bfloat16, device=device)[name]
    target = torch.randint(40, (4, 7), device=device)[:, 1::2].T
    beside_torch(logits, target, reduction="none", grads=(torch.randn(4, 3, device=device).T,))
    beside_torch(logits, target.int())
    beside_torch(logits[:, :-1], target[:, 1:])


def test_forward_error_in_the_sum(device: str) -> None:
    """Many rows: the sum of their losses is float32, its error that of float32."""
    logits, target = torch.randn(60, 3, device=device), torch.randint(3, (60,), device=device)
    exact = F.cross_entropy(logits.double(), target, reduction="sum")
    close(cross_entropy(logits, target, reduction="sum"), F.cross_entropy(logits, target, reduction="sum"), exact)


def test_refused(device: str) -> None:
    logits, target = torch.zeros(3, 7, device=device), torch.zeros(3, dtype=torch.long, device=device)
    with pytest.raises(ConfigError, match="reduction='average'"):
        cross_entropy(logits, target, reduction="average")
    with pytest.raises(ConfigError, match=r"targets must be \(3,\)"):
        cross_entropy(logits, target[:2])
    with pytest.raises(ConfigError, match="it is one number"):
        cross_entropy(logits, target, reduction="sum", denominator=target[0])
