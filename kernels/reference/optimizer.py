"""Twins of what goes over many tensors at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .norm import statistics


def accumulate_(main: list[Tensor], grads: list[Tensor], rows: Tensor, owners: Tensor, addresses: Tensor) -> None:
    for total, grad in zip(main, grads, strict=True):
        total.copy_(total.to(statistics(total)) + grad)


def grad_stats(grads: list[Tensor], rows: Tensor, owners: Tensor, addresses: Tensor) -> Tensor:
    wide = [grad.float() for grad in grads]
    sums = [torch.stack((grad.square().sum(), (~grad.isfinite()).sum().float())) for grad in wide]
    return torch.stack(sums) if sums else torch.empty(0, 2)


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    copies: list[Tensor],
    rows: Tensor,
    owners: Tensor,
    addresses: Tensor,
    hyper: Tensor,
    progress: Tensor,
    stats: Tensor | None,
    grad_scale: Tensor | None,
    stochastic_rounding: bool,
    zero_grads: bool,
) -> None:
    taken = int(progress[0])
    factor = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    norm = 0.0 if stats is None else math.sqrt(float(stats[:, 0].sum())) * factor
    finite = stats is None or (math.isfinite(norm) and not stats[:, 1].any())
    for i, (param, grad, mean, square) in enumerate(zip(params, grads, means, squares, strict=True)):
        if finite:
            group = hyper[int(rows[i, 2])].tolist()
            clip = min(group[7] / (norm + 1e-6), 1.0) if group[7] < math.inf else 1.0
            new = _moved(param, grad.float() * (factor * clip), mean, square, group, taken + 1)
            if copies:
                copies[i].copy_(new)
            param.copy_(_rounded(new, i, taken) if stochastic_rounding else new)
        if zero_grads:
            grad.zero_()
    progress[0] += int(finite and len(params) > 0)


def _moved(param: Tensor, grad: Tensor, mean: Tensor, square: Tensor, group: list[float], t: int) -> Tensor:
    lr, c1, c2, log1, log2, eps, weight_decay, _ = group
    mean.lerp_(grad, c1)
    square.lerp_(grad.square(), c2)
    rate, root = lr / -math.expm1(log1 * t), math.sqrt(-math.expm1(log2 * t))
    return param.float() * (1 - lr * weight_decay) - rate * mean / (square.sqrt() / root + eps)


def _rounded(value: Tensor, row: int, taken: int) -> Tensor:
    """To bfloat16, up or down by 16 bits of a hash of (row, step, element)."""
    at = torch.arange(value.numel(), device=value.device)
    key = _mix(_mix(torch.tensor(row)) ^ taken)
    noise = _mix(_mix((at & 0xFFFFFFFF) ^ key) ^ (at >> 32)) & 0xFFFF
    memory = value.as_strided((value.numel(),), (1,))  # elements in the order in which they lie
    bits = ((memory.view(torch.int32) + noise.int()) & -0x10000).view(torch.float32)
    return torch.where(memory.isfinite(), bits, memory).as_strided(value.shape, value.stride())


def _mix(x: Tensor) -> Tensor:
    """A hash of 32 bits to 32 bits (Wellons' lowbias32), in int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
