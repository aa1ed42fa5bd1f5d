"""AdamW over many parameters in one launch: unscale, clip, step, low-precision copy, gradients zeroed.

Bytes a parameter with float32 parameter, gradient and moments and a bfloat16 copy: 34. What changes from step to step
is in device memory, and so is the decision to skip a step whose gradients are not finite: nothing synchronises, a
captured graph can be replayed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipekern.errors import ConfigError

from . import reference
from .language import element, jit, launch, narrow, tl
from .library import define
from .table import Table, chunk, current


@jit
def _one_minus_power(log, t):
    """1 − exp(log · t) to float32's precision, too, where the power is nearly 1."""
    x = log * t
    series = 1 + x / 9
    for i in tl.static_range(7):
        series = 1 + x / (8 - i) * series
    return tl.where(x > -0.5, -x * series, 1 - tl.exp(x))


@jit
def _factor(stats, count, grad_scale, max_norm, BLOCK: tl.constexpr):
    """What gradients are multiplied by, and whether all of them and their norm are finite."""
    squares = tl.zeros((BLOCK,), tl.float32)
    wrong = tl.zeros((BLOCK,), tl.float32)
    factor = tl.full((), 1, tl.float32)
    if grad_scale is not None:
        factor = tl.div_rn(factor, tl.load(grad_scale).to(tl.float32))
    if stats is not None:
        for first in range(0, count, BLOCK):
            at = first + tl.arange(0, BLOCK)
            squares += tl.load(stats + 2 * at, at < count, 0)
            wrong += tl.load(stats + 2 * at + 1, at < count, 0)
        norm = tl.sqrt_rn(tl.sum(squares, 0)) * factor
        factor *= tl.where(max_norm < float("inf"), tl.minimum(tl.div_rn(max_norm, norm + 1e-6), 1), 1)
    return factor, (tl.sum(wrong, 0) == 0) & (tl.sum(squares, 0) < float("inf"))


@jit
def _mix(x):
    """A hash of 32 bits to 32 bits (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _update(
    param, grad, mean, square, copy, at, mask, factor, rate, keep, c1, c2, root, eps, key,
    STOCHASTIC: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    g = tl.load(grad + at, mask).to(tl.float32) * factor
    m = tl.load(mean + at, mask)
    v = tl.load(square + at, mask)
    m += (g - m) * c1
    v += (g * g - v) * c2
    p = tl.load(param + at, mask).to(tl.float32) * keep - rate * m / (tl.sqrt(v) * root + eps)
    tl.store(mean + at, m, mask)
    tl.store(square + at, v, mask)
    if copy is not None:
        tl.store(copy + at, narrow(p, copy.dtype.element_ty), mask)
    if STOCHASTIC:
        noise = _mix(_mix(at.to(tl.uint32) ^ key) ^ (at >> 32).to(tl.uint32)) & 0xFFFF
        bits = (p.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
        p = tl.where(tl.abs(p) < float("inf"), bits.to(tl.float32, bitcast=True), p)
    tl.store(param + at, narrow(p, param.dtype.element_ty), mask)
    if ZERO:
        tl.store(grad + at, tl.zeros_like(g).to(grad.dtype.element_ty), mask)


@jit
def _rates(hyper, t):
    """From a group's row: what moves and shrinks a parameter, and what is new in a moment, in step ``t``."""
    lr = tl.load(hyper)
    rate = tl.div_rn(lr, _one_minus_power(tl.load(hyper + 3), t))
    root = tl.div_rn(1.0, tl.sqrt_rn(_one_minus_power(tl.load(hyper + 4), t)))
    return rate, 1 - lr * tl.load(hyper + 6), tl.load(hyper + 1), tl.load(hyper + 2), root, tl.load(hyper + 5)


@jit
def _sweep(
    row, start, end, finite, factor, rate, keep, c1, c2, root, eps, key,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COPY: tl.constexpr, STOCHASTIC: tl.constexpr, ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The elements from ``start`` to ``end`` of a row; full blocks of aligned tensors by 16-byte accesses."""
    together = tl.load(row + 3) | tl.load(row + 4) | tl.load(row + 5) | tl.load(row + 6)
    param = tl.load(row + 3).to(tl.pointer_type(PARAM))
    grad = tl.load(row + 4).to(tl.pointer_type(GRAD))
    mean = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    square = tl.load(row + 6).to(tl.pointer_type(tl.float32))
    copy = None
    wide = None
    if COPY is not None:
        together |= tl.load(row + 7)
        copy = tl.load(row + 7).to(tl.pointer_type(COPY))
        wide = tl.multiple_of(copy, 16)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        if not finite:
            if ZERO:
                tl.store(grad + at, tl.zeros((BLOCK,), GRAD), at < end)
        elif (together % 16 == 0) & (first + BLOCK <= end):
            _update(
                tl.multiple_of(param, 16), tl.multiple_of(grad, 16), tl.multiple_of(mean, 16),
                tl.multiple_of(square, 16), wide, at, None,
                factor, rate, keep, c1, c2, root, eps, key, STOCHASTIC, ZERO,
            )  # fmt: skip
        else:
            _update(
                param, grad, mean, square, copy, at, at < end,
                factor, rate, keep, c1, c2, root, eps, key, STOCHASTIC, ZERO,
            )  # fmt: skip


@jit
def _step(
    rows, owners, hyper, progress, stats, grad_scale, count,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COPY: tl.constexpr, STOCHASTIC: tl.constexpr, ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program makes one chunk; the last to end counts the step, after all have read how many there were."""
    owner, row, start, end = chunk(rows, owners, 7 if COPY is None else 8)
    hyper += tl.load(row + 2) * 8
    taken = tl.load(progress)
    rate, keep, c1, c2, root, eps = _rates(hyper, (taken + 1).to(tl.float32))
    factor, finite = _factor(stats, count, grad_scale, tl.load(hyper + 7), 1024)
    key = _mix(_mix(owner.to(tl.uint32)) ^ taken.to(tl.uint32))
    _sweep(
        row, start, end, finite, factor, rate, keep, c1, c2, root, eps, key, PARAM, GRAD, COPY, STOCHASTIC, ZERO, BLOCK
    )
    tl.debug_barrier()  # every warp has read progress before one thread says that this program has
    done = tl.atomic_add(progress + 1, 1)
    if done == tl.num_programs(0) - 1:
        tl.store(progress + 1, 0)
        tl.store(progress, taken + finite.to(tl.int32))


def _kernel(
    params: list[Tensor], grads: list[Tensor], means: list[Tensor], squares: list[Tensor], copies: list[Tensor],
    rows: Tensor, owners: Tensor, addresses: Tensor, hyper: Tensor, progress: Tensor, stats: Tensor | None,
    grad_scale: Tensor | None, stochastic_rounding: bool, zero_grads: bool,
) -> None:  # fmt: skip
    if not params:
        return
    columns = (params, grads, means, squares, *([copies] if copies else []))
    rows, owners = current(rows, owners, addresses, *columns)
    launch(
        _step, len(owners), 8, rows, owners, hyper, progress, stats, grad_scale, 0 if stats is None else len(stats),
        PARAM=element(params[0].dtype), GRAD=element(grads[0].dtype), COPY=element(copies[0].dtype) if copies else None,
        STOCHASTIC=stochastic_rounding, ZERO=zero_grads, BLOCK=2048,
    )  # fmt: skip


define(
    "adamw_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] means, Tensor(d!)[] squares, Tensor(e!)[] copies,"
    " Tensor rows, Tensor owners, Tensor addresses, Tensor hyper, Tensor(f!) progress, Tensor? stats,"
    " Tensor? grad_scale, bool stochastic_rounding, bool zero_grads) -> ()",
    twin=reference.adamw_step, kernel=_kernel, fake=lambda *_: None,
)  # fmt: skip


def hyper_row(
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    max_norm: float = math.inf,
) -> list[float]:
    """A parameter group's row of ``hyper``: lr, 1 − β₁, 1 − β₂, ln β₁, ln β₂, eps, weight_decay, max_norm.

    Not the betas themselves: 1 − 0.999 in float32 is off in the fifth digit.
    """
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    return [lr, 1 - betas[0], 1 - betas[1], *logs, eps, weight_decay, max_norm]


def adamw_step(
    table: Table,
    hyper: Tensor,
    progress: Tensor,
    stats: Tensor | None = None,
    grad_scale: Tensor | None = None,
    stochastic_rounding: bool = False,
    zero_grads: bool = False,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019) on every row of a table; all other arguments are on its device.

    Args:
        table: ``Table(params, grads, means, squares)``, moments in float32, or with a fifth column of copies that get
            the new parameters, rounded to the nearest. ``groups`` are the rows of ``hyper``.
        hyper: float32 [groups, 8], each a :func:`hyper_row`.
        progress: int32 [2], zeros at first: the steps taken, and a counter of the launch. A skipped step does not
            count.
        stats: float32 [n, 2] of :func:`grad_stats`, over all parameters whose gradients have one norm, those of other
            ranks included. Where a value, or the norm, is not finite the step is skipped; the norm is clipped to
            ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does. Without it neither.
        grad_scale: What gradients are divided by, one number: the loss scale.
        stochastic_rounding: bfloat16 parameters are rounded up or down at random, to the nearer more often, so that
            small steps are not lost; the same from run to run.
        zero_grads: Gradients are zeros afterwards, after a skipped step, too.

    Raises:
        ConfigError: Shapes or dtypes do not go together.
    """
    params, grads, means, squares, *copies = table.columns
    if hyper.dtype != torch.float32 or hyper.dim() != 2 or hyper.shape[1] != 8 or not hyper.is_contiguous():
        raise ConfigError(
            f"hyper is {tuple(hyper.shape)} of {hyper.dtype}; it must be [groups, 8] of float32, contiguous"
        )
    if progress.dtype != torch.int32 or progress.shape != (2,):
        raise ConfigError(
            f"progress is {tuple(progress.shape)} of {progress.dtype}; it must be two zeros of int32 at first"
        )
    if stats is not None and (stats.dtype != torch.float32 or stats.shape[1:] != (2,) or not stats.is_contiguous()):
        raise ConfigError(f"stats is {tuple(stats.shape)} of {stats.dtype}; it must be [n, 2] of float32, contiguous")
    if means and (means[0].dtype != torch.float32 or squares[0].dtype != torch.float32):
        raise ConfigError(f"moments are {means[0].dtype} and {squares[0].dtype}; they must be float32")
    if stochastic_rounding and params and params[0].dtype != torch.bfloat16:
        raise ConfigError(f"stochastic_rounding is for bfloat16 parameters; these are {params[0].dtype}: leave it out")
    with torch.no_grad():
        torch.ops.pipekern.adamw_step(
            params, grads, means, squares, copies[0] if copies else [], table.rows, table.owners, table.addresses,
            hyper, progress, stats, grad_scale, stochastic_rounding, zero_grads,
        )  # fmt: skip
