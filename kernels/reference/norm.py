"""Twins of the normalisations."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics(x: Tensor) -> torch.dtype:
    """The dtype in which ``x`` is summed."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    h = x if residual is None else x + residual
    wide = h.to(statistics(x))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * rstd if weight is None else wide * rstd * weight
    return y.to(x.dtype).contiguous(), x.new_empty(0) if residual is None else h.contiguous(), rstd.contiguous()


def rms_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    grad, normal = dy.to(rstd.dtype), h * rstd
    dw = h.new_empty(0) if weight is None else (grad * normal).sum_to_size(h.shape[-1:]).to(weight.dtype)
    if weight is not None:
        grad = grad * weight
    dx = (grad - normal * (grad * normal).mean(-1, keepdim=True)) * rstd
    return (dx if dh is None else dx + dh).to(h.dtype).contiguous(), dw


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    h = x if residual is None else x + residual
    wide = h.to(statistics(x))
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    shift = centred.mean(-1, keepdim=True)  # what rounding left of the mean
    mean, centred = mean + shift, centred - shift
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    stats = torch.cat((mean, rstd), -1).contiguous()
    return y.to(x.dtype).contiguous(), x.new_empty(0) if residual is None else h.contiguous(), stats


def layer_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = stats.split(1, -1)
    grad, normal = dy.to(stats.dtype), (h - mean) * rstd
    dw = h.new_empty(0) if weight is None else (grad * normal).sum_to_size(h.shape[-1:]).to(weight.dtype)
    db = h.new_empty(0) if bias is None else grad.sum_to_size(h.shape[-1:]).to(bias.dtype, copy=True)
    if weight is not None:
        grad = grad * weight
    dot = (grad * normal).mean(-1, keepdim=True)
    dx = (grad - grad.mean(-1, keepdim=True) - normal * dot) * rstd
    return (dx if dh is None else dx + dh).to(h.dtype).contiguous(), dw, db
