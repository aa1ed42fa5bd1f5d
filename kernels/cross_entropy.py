"""Cross entropy of logits, with label smoothing and z-loss. Bytes a logit in bfloat16, forward and backward: 2 and 4.

With m = max x and y the target, s = Σ exp(xⱼ − m) is kept without its target's term, as r: where the target is the
largest logit the loss is log(1 + r), and its gradient −r / s. Neither is a difference of large numbers, so that
confident logits keep their digits. Nothing synchronises: the number of targets that count, too, stays on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipekern.errors import ConfigError

from . import reference
from .language import check_floats, jit, launch, narrow, tl
from .layout import even, lead, slabs, step
from .library import define
from .peel import block_of, peels, start_of

REDUCTIONS = ("mean", "sum", "none")


@jit
def _log1p(u):
    """log(1 + u) to float32's precision for small u, too (Kahan's correction of 1 + u's rounding)."""
    w = 1 + u
    return tl.where(w == 1, u, tl.log(w) * (u / tl.where(w == 1, 1, w - 1)))


@jit
def _keep(stats, peak, rest, own, counts):
    """What the backward pass needs of a row, and whether its target counts."""
    tl.store(stats, peak)
    tl.store(stats + 1, rest)
    tl.store(stats + 2, own)
    tl.store(stats + 3, counts)


@jit
def _forward(
    x, x0, x1, x2, x3, target, t0, t1, t2, loss, stats, ignore, smoothing, z_loss, B, C, V,
    SMOOTH: tl.constexpr, Z: tl.constexpr, STEP: tl.constexpr, PEEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program makes one row in one pass: the largest logit so far, and the sum relative to it."""
    row = tl.program_id(0).to(tl.int64)
    V = even(V, STEP)
    x += lead(row, B, C, x0, x1, x2, STEP)
    first = start_of(x, PEEL)
    label = tl.load(target + lead(row, B, C, t0, t1, t2, 1)).to(tl.int64)
    if label == ignore:
        _keep(stats + 4 * row, 0.0, 0.0, 0.0, 0.0)
        tl.store(loss + row, 0.0)
        return
    known = (label >= 0) & (label < V)
    peak = tl.full((), float("-inf"), tl.float32)
    others = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        at, col = block_of(start, first, V, PEEL, BLOCK)
        if PEEL & (first + start + BLOCK <= V):
            value = tl.load(tl.multiple_of(x + first, 16) + at).to(tl.float32)
        else:
            value = tl.load(x + col * x3, at < V, float("-inf")).to(tl.float32)
        top = tl.maximum(peak, tl.max(value, 0))
        base = tl.where(top == float("-inf"), 0, top)
        others = others * tl.exp(peak - base) + tl.where(col == label, 0, tl.exp(value - base))
        peak = top
        if SMOOTH:
            total += tl.where(at < V, value, 0)
    rest = tl.where(known, tl.sum(others, 0), float("nan"))
    own = tl.load(x + label * x3, known, 0).to(tl.float32)
    log_sum = tl.log(rest + tl.exp(own - peak))
    value = tl.where(own == peak, _log1p(rest), peak - own + log_sum)
    if SMOOTH:
        value = (1 - smoothing) * value + smoothing * (peak + log_sum - tl.sum(total, 0) / V)
    if Z:
        value += z_loss * (peak + log_sum) * (peak + log_sum)
    tl.store(loss + row, value)
    _keep(stats + 4 * row, peak, rest, own, 1.0)


@jit
def _reduce(loss, stats, given, out, denominator, T, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """One program adds all losses in their order, and divides by ``given``, or by the number of targets that count."""
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, T, BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        total += tl.load(loss + row, row < T, 0)
        count += tl.load(stats + 4 * row + 3, row < T, 0)
    by = tl.full((), 1, tl.float32)
    if given is not None:
        by = tl.load(given).to(tl.float32)
    elif COUNT:
        by = tl.maximum(tl.sum(count, 0), 1)
    tl.store(out, tl.sum(total, 0) / by)
    tl.store(denominator, by)


@jit
def _backward(
    dloss, d0, d1, d2, x, x0, x1, x2, x3, target, t0, t1, t2, stats, denominator, dx, g0, g1, g2, g3,
    smoothing, z_loss, B, C, V,
    SMOOTH: tl.constexpr, Z: tl.constexpr, STEP: tl.constexpr, PEEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program makes one block of one row; dx may be x, of which nothing else is read."""
    V = even(V, STEP)
    across = tl.cdiv(V, BLOCK)
    row = tl.program_id(0).to(tl.int64) // across
    start = tl.program_id(0).to(tl.int64) % across * BLOCK
    x += lead(row, B, C, x0, x1, x2, STEP)
    dx += lead(row, B, C, g0, g1, g2, STEP)
    first = start_of(x, PEEL)
    whole = PEEL & (first + start + BLOCK <= V) & ((x.to(tl.int64) - dx.to(tl.int64)) % 16 == 0)
    at, col = block_of(start, first, V, PEEL, BLOCK)
    peak = tl.load(stats + 4 * row)
    rest = tl.load(stats + 4 * row + 1)
    total = rest + tl.exp(tl.load(stats + 4 * row + 2) - peak)
    width = tl.where(tl.load(stats + 4 * row + 3) > 0, V, 0)  # nothing of a row that does not count is read
    scale = tl.load(dloss + lead(row, B, C, d0, d1, d2, 1)).to(tl.float32)
    if denominator is not None:
        scale /= tl.load(denominator)
    own = col == tl.load(target + lead(row, B, C, t0, t1, t2, 1))
    if whole & (width == V):
        value = tl.load(tl.multiple_of(x + first, 16) + at).to(tl.float32)
    else:
        value = tl.load(x + col * x3, at < width, 0).to(tl.float32)
    inverse = tl.div_rn(1.0, total)
    share = tl.exp(value - peak) * inverse
    grad = tl.where(own, -rest * inverse, share)
    if Z:
        grad += share * (2 * z_loss * (peak + tl.log(total)))
    if SMOOTH:
        grad += tl.where(own, smoothing, 0) - smoothing / V
    grad = narrow(tl.where(at < width, grad * scale, 0), dx.dtype.element_ty)
    if whole:
        tl.store(tl.multiple_of(dx + first, 16) + at, grad)
    else:
        tl.store(dx + col * g3, grad, at < V)


def _kernel(
    logits: Tensor, target: Tensor, given: Tensor | None, ignore_index: int, smoothing: float, z_loss: float,
    reduction: str, overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_floats(logits=logits)
    out, stats, denominator = _fake(logits, target, given, ignore_index, smoothing, z_loss, reduction, overwrite)
    loss = out if reduction == "none" else logits.new_empty(target.shape, dtype=torch.float32)
    V = logits.shape[-1]
    block = min(1 << max(V - 1, 127).bit_length(), 8192)
    for slab in slabs(logits, target.unsqueeze(-1), loss.unsqueeze(-1), stats):
        of_logits, (of_target, *to_target, _), (of_loss, *_), (of_stats, *_) = slab.tensors
        peel = peels(V, block, of_logits)
        launch(
            _forward, slab.rows, max(block // (512 if peel else 1024), 1), *of_logits, of_target, *to_target, of_loss,
            of_stats, ignore_index, smoothing, z_loss, slab.b, slab.c, V, SMOOTH=smoothing != 0, Z=z_loss != 0,
            STEP=step(V, of_logits), PEEL=peel, BLOCK=block,
        )  # fmt: skip
    if reduction != "none":
        launch(
            _reduce, 1, 8, loss, stats, given, out, denominator, target.numel(), COUNT=reduction == "mean", BLOCK=2048
        )
    return out, stats, denominator


def _fake(
    logits: Tensor, target: Tensor, given: Tensor | None, ignore_index: int, smoothing: float, z_loss: float,
    reduction: str, overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = reference.statistics(logits)
    return (
        logits.new_empty(target.shape if reduction == "none" else (), dtype=wide),
        logits.new_empty((*target.shape, 4), dtype=wide),
        logits.new_empty((), dtype=wide),
    )


def _backward_kernel(
    dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, denominator: Tensor | None, smoothing: float,
    z_loss: float,
) -> Tensor:  # fmt: skip
    dx = logits.new_empty(logits.shape)
    _fill(dx, dloss, logits, target, stats, denominator, smoothing, z_loss)
    return dx


def _backward_in_place(
    dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, denominator: Tensor | None, smoothing: float,
    z_loss: float,
) -> None:  # fmt: skip
    _fill(logits, dloss, logits, target, stats, denominator, smoothing, z_loss)


def _fill(
    dx: Tensor, dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, denominator: Tensor | None,
    smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    V = logits.shape[-1]
    block = min(1 << max(V - 1, 127).bit_length(), 4096)
    for slab in slabs(dloss.expand(target.shape).unsqueeze(-1), logits, target.unsqueeze(-1), stats, dx):
        (of_dloss, *to_dloss, _), of_logits, (of_target, *to_target, _), (of_stats, *_), of_dx = slab.tensors
        peel = peels(V, block, of_logits, of_dx)
        launch(
            _backward, slab.rows * -(-V // block), max(block // (512 if peel else 1024), 1), of_dloss, *to_dloss,
            *of_logits, of_target, *to_target, of_stats, denominator, *of_dx, smoothing, z_loss, slab.b, slab.c, V,
            SMOOTH=smoothing != 0, Z=z_loss != 0, STEP=step(V, of_logits, of_dx), PEEL=peel, BLOCK=block,
        )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, _, _, smoothing, z_loss, reduction, ctx.overwrite = inputs
    _, stats, denominator = output
    ctx.save_for_backward(logits, target, stats, None if reduction == "none" else denominator)
    ctx.options = smoothing, z_loss
    ctx.mark_non_differentiable(stats, denominator)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    logits, *saved = ctx.saved_tensors
    if dloss is None:
        return (None,) * 8
    if ctx.overwrite:
        grad = logits.detach()
        torch.ops.pipekern.cross_entropy_backward_(dloss, grad, *saved, *ctx.options)
    else:
        grad = torch.ops.pipekern.cross_entropy_backward(dloss, logits, *saved, *ctx.options)
    return grad, None, None, None, None, None, None, None


define(
    "cross_entropy(Tensor logits, Tensor target, Tensor? denominator, int ignore_index, float label_smoothing,"
    " float z_loss, str reduction, bool overwrite) -> (Tensor, Tensor, Tensor)",
    twin=reference.cross_entropy, kernel=_kernel, fake=_fake, save=_save, backward=_gradients,
)  # fmt: skip
_ARGUMENTS = "Tensor target, Tensor stats, Tensor? denominator, float label_smoothing, float z_loss"
define(
    f"cross_entropy_backward(Tensor dloss, Tensor logits, {_ARGUMENTS}) -> Tensor",
    twin=reference.cross_entropy_backward, kernel=_backward_kernel,
    fake=lambda dloss, logits, *_: logits.new_empty(logits.shape),
)  # fmt: skip
define(
    f"cross_entropy_backward_(Tensor dloss, Tensor(a!) logits, {_ARGUMENTS}) -> ()",
    twin=reference.cross_entropy_backward_, kernel=_backward_in_place, fake=lambda *_: None,
)  # fmt: skip


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    denominator: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Cross entropy over the last dimension: −log softmax(logits)[target], plus ``z_loss`` · log²(Σ exp logits).

    A mean over no target at all is 0, where torch's is NaN. A target that is neither a class nor ``ignore_index`` makes
    loss and gradients NaN: looking for one would stop the host.

    Args:
        logits: [..., V], any strides; float32, bfloat16 or float16.
        target: [...], integers.
        ignore_index: Targets of this value have neither loss nor gradient, and do not count.
        label_smoothing: As ``torch.nn.functional.cross_entropy``.
        z_loss: Weight of the squared log of the partition function (Chowdhery et al., 2022).
        reduction: "mean", "sum" or "none".
        denominator: With "mean", what the sum is divided by, a tensor of one number on the device of ``logits``, in
            place of the number of targets that count: that of all micro-batches, say.
        overwrite: The gradient takes the memory of ``logits``, which nothing else may read any more.

    Returns:
        float32, 0-d, or [...] with "none".

    Raises:
        ConfigError: The shapes do not go together, or ``reduction`` is none of these.
    """
    if logits.shape[:-1] != target.shape:
        raise ConfigError(
            f"logits are {tuple(logits.shape)}, so targets must be {tuple(logits.shape[:-1])}: they are "
            f"{tuple(target.shape)}"
        )
    check_reduction(reduction, denominator)
    options = (ignore_index, label_smoothing, z_loss, reduction, overwrite)
    return torch.ops.pipekern.cross_entropy(logits, target, denominator, *options)[0]


def check_reduction(reduction: str, denominator: Tensor | None) -> None:
    """Raises ConfigError where ``reduction`` is unknown, or a denominator would go unused."""
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction={reduction!r}; it must be one of {', '.join(REDUCTIONS)}")
    if denominator is not None and (reduction != "mean" or denominator.numel() != 1):
        raise ConfigError(
            f"a denominator of {denominator.numel()} numbers with reduction={reduction!r}; it is one number, for a mean"
        )
