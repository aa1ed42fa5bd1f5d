"""Cross entropy of x · weightᵀ without the logits of all tokens: chunk by chunk, in at most 256 MiB.

The forward pass makes the gradients, too, while a chunk's logits are there: 6·T·H·V operations in all. Making the
logits again in the backward pass would be 8·T·H·V, a third more of what bounds the time. The price is that the
weight's gradient exists before the loss has one. Without ``main_grad`` it waits in float32, and the backward pass
scales and rounds it once; with ``main_grad`` it is added there at once, so the gradient that the loss will get must
be known (``grad_scale``), and a different one turns the gradient of ``x`` to NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipekern.errors import ConfigError

from .cross_entropy import check_reduction
from .library import define
from .linear_backward import linear_backward_weight

SCRATCH = 2**28  # bytes of logits at a time


def _chunk(tokens: int, vocabulary: int, itemsize: int) -> int:
    """Rows of logits at a time: of even size, in multiples of 128, the tile of a product."""
    most = max(SCRATCH // (vocabulary * itemsize), 1)
    most = most // 128 * 128 or most
    count = max(-(-tokens // most), 1)
    return min(most, max(-(-tokens // (count * 128)), 1) * 128)


def _denominator(labels: Tensor, given: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    if given is not None:
        return given.reshape(())
    if reduction == "mean":
        return (labels != ignore_index).sum().clamp(min=1)
    return torch.ones((), device=labels.device)


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, given: Tensor | None, grad_scale: Tensor | None,
    main_grad: Tensor | None, ignore_index: int, smoothing: float, z_loss: float, reduction: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _fake(
        x, weight, bias, target, given, grad_scale, main_grad, ignore_index, smoothing, z_loss, reduction, needs
    )
    loss, by, dx, dw, db = outputs
    rows, labels, gradients = x.reshape(-1, x.shape[-1]), target.reshape(-1), dx.view(-1, x.shape[-1])
    by.copy_(_denominator(labels, given, ignore_index, reduction))
    scale = torch.ones_like(by) if main_grad is None else (1 if grad_scale is None else grad_scale.reshape(())) / by
    losses = loss.new_empty(labels.shape)
    stride = -(-len(weight) // 16) * 16  # of aligned rows, for the products and for the kernels
    chunk = _chunk(len(rows), stride, x.element_size())
    scratch = x.new_empty(min(chunk, len(rows)), stride)[:, : len(weight)]
    db.zero_()
    if not len(rows):
        dw.zero_()
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        logits = scratch[: len(rows[part])]
        if bias is None:
            torch.mm(rows[part], weight.T, out=logits)
        else:
            torch.addmm(bias, rows[part], weight.T, out=logits)
        options = (ignore_index, smoothing, z_loss, "none", False)
        losses[part], stats, _ = torch.ops.pipekern.cross_entropy(logits, labels[part], None, *options)
        if any(needs):
            torch.ops.pipekern.cross_entropy_backward_(scale, logits, labels[part], stats, None, smoothing, z_loss)
        if needs[0]:
            torch.mm(logits, weight, out=gradients[part])
        if needs[1]:
            into, beta = (dw, float(start > 0)) if main_grad is None else (main_grad, 1.0)
            linear_backward_weight(logits, rows[part], into, beta)
        if needs[2]:
            db += logits.sum(0, dtype=db.dtype)
    torch.div(losses.sum(), by, out=loss)
    return outputs


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, given: Tensor | None, grad_scale: Tensor | None,
    main_grad: Tensor | None, ignore_index: int, smoothing: float, z_loss: float, reduction: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty((), dtype=wide),
        x.new_empty((), dtype=wide),
        x.new_empty(x.shape if needs[0] else (0, x.shape[-1])),
        x.new_empty(weight.shape if needs[1] and main_grad is None else (0,), dtype=wide),
        x.new_empty(len(weight) if needs[2] else 0, dtype=wide),
    )


define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? denominator,"
    " Tensor? grad_scale, Tensor(a!)? main_grad, int ignore_index, float label_smoothing, float z_loss,"
    " str reduction, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    twin=_run, kernel=_run, fake=_fake,
)  # fmt: skip


class _Loss(torch.autograd.Function):
    """The op changes ``main_grad``, and torch.library gives no gradient to an op that changes something."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        *_, grad_scale, main_grad, _, _, _, _, needs = rest
        loss, by, dx, dw, db = torch.ops.pipekern.linear_cross_entropy(x, weight, bias, *rest)
        ctx.save_for_backward(dx, dw, db, by, grad_scale)
        ctx.needs, ctx.added = needs, main_grad is not None
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db, by, grad_scale = ctx.saved_tensors
        scale = dloss / by
        if ctx.added:
            expected = torch.ones_like(dloss) if grad_scale is None else grad_scale.reshape(())
            scale = torch.where(dloss == expected, torch.ones_like(by), torch.nan)
        dtypes = (dx.dtype, *ctx.dtypes)
        wanted = (ctx.needs[0], ctx.needs[1] and not ctx.added, ctx.needs[2])
        grads = [
            _scaled(t, scale, dtype) if want else None
            for t, dtype, want in zip((dx, dw, db), dtypes, wanted, strict=True)
        ]
        return (*grads, *(None,) * 9)


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """One pass, with all bits of ``scale``, which as a 0-d tensor would be rounded to the gradient's dtype first."""
    return torch.mul(gradient, scale.reshape(1), out=torch.empty_like(gradient, dtype=dtype))


def _check(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, reduction: str, denominator: Tensor | None,
    main_grad: Tensor | None, grad_scale: Tensor | None,
) -> None:  # fmt: skip
    check_reduction(reduction, denominator)
    if reduction == "none":
        raise ConfigError('reduction="none" needs the gradient of every token first: use cross_entropy of the product')
    vocabulary = () if bias is None else bias.shape
    if x.shape[:-1] != target.shape or weight.shape[1:] != x.shape[-1:] or vocabulary not in ((), weight.shape[:1]):
        raise ConfigError(
            f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(vocabulary)} and target "
            f"{tuple(target.shape)}; they must be [..., H], [V, H], [V] and [...]"
        )
    if main_grad is None and grad_scale is not None:
        raise ConfigError("grad_scale is for main_grad, and there is none: leave it out")
    if main_grad is not None and (main_grad.shape != weight.shape or main_grad.dtype != torch.float32):
        raise ConfigError(
            f"main_grad is {tuple(main_grad.shape)} of {main_grad.dtype}; it must be {tuple(weight.shape)} of float32"
        )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    denominator: Tensor | None = None,
    main_grad: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """:func:`cross_entropy` of ``x · weightᵀ + bias``, with at most 256 MiB of logits at a time.

    Under autocast the products are in its dtype.

    Args:
        x: [..., H]; float32, bfloat16 or float16. Copied where its rows do not lie evenly.
        weight: [V, H], of the same dtype.
        target: [...], integers.
        bias: [V].
        ignore_index: As there, like the other options.
        reduction: "mean" or "sum".
        main_grad: [V, H], float32: the gradient of ``weight`` is added there, in this call, and ``weight`` gets none.
        grad_scale: With ``main_grad``, the gradient that the loss will get, one number on the device, such as a loss
            scale; without it 1. If the loss gets another one, the gradient of ``x`` is NaN.

    Returns:
        float32, 0-d.

    Raises:
        ConfigError: Shapes or options do not go together.
    """
    _check(x, weight, target, bias, reduction, denominator, main_grad, grad_scale)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    return _Loss.apply(
        x, weight, bias, target, denominator, grad_scale, main_grad if needs[1] else None,
        ignore_index, label_smoothing, z_loss, reduction, needs,
    )  # fmt: skip
