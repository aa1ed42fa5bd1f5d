"""Twins of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import statistics


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    given: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    reduction: str,
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, V = logits.to(statistics(logits)), logits.shape[-1]
    counts, known = target != ignore_index, (target >= 0) & (target < V)
    index = target.long().clamp(0, V - 1).unsqueeze(-1)
    peak = wide.amax(-1)
    own = wide.gather(-1, index).squeeze(-1)
    rest = torch.exp(wide - peak.unsqueeze(-1)).scatter(-1, index, 0).sum(-1)
    rest = torch.where(known, rest, torch.nan)
    log_sum = torch.log(rest + torch.exp(own - peak))
    loss = torch.where(own == peak, torch.log1p(rest), peak - own + log_sum)
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (peak + log_sum - wide.mean(-1))
    if z_loss:
        loss = loss + z_loss * (peak + log_sum).square()
    loss = torch.where(counts, loss, 0)
    by = loss.new_ones(()) if given is None else given.to(loss.dtype).reshape(()).clone()
    if reduction == "mean" and given is None:
        by = counts.sum().clamp(min=1).to(loss.dtype)
    stats = torch.stack((peak, rest, own, counts.to(loss.dtype)), -1).contiguous()
    return loss.contiguous() if reduction == "none" else loss.sum() / by, stats, by


def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    denominator: Tensor | None,
    smoothing: float,
    z_loss: float,
) -> Tensor:
    peak, rest, own, counts = stats.split(1, -1)
    index = target.long().clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
    total = rest + torch.exp(own - peak)
    share = torch.exp(logits - peak) / total
    grad = share.scatter(-1, index, -rest / total)
    if z_loss:
        grad = grad + share * (2 * z_loss * (peak + torch.log(total)))
    if smoothing:
        smooth = torch.full_like(grad, -smoothing / logits.shape[-1])
        grad = grad + smooth.scatter_add(-1, index, torch.full_like(total, smoothing))
    scale = dloss.expand(target.shape).unsqueeze(-1).to(grad.dtype)
    if denominator is not None:
        scale = scale / denominator
    return torch.where(counts > 0, grad * scale, 0).to(logits.dtype).contiguous()


def cross_entropy_backward_(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    denominator: Tensor | None,
    smoothing: float,
    z_loss: float,
) -> None:
    logits.copy_(cross_entropy_backward(dloss, logits, target, stats, denominator, smoothing, z_loss))
