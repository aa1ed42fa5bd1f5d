"""Twins of the rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import statistics


def _turn(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> Tensor:
    wide, half = x.to(statistics(x)), cos.shape[-1]
    turning, rest = wide[..., : 2 * half], wide[..., 2 * half :]
    a, b = turning.unflatten(-1, (half, 2)).unbind(-1) if neighbours else turning.chunk(2, -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # for all heads
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if neighbours else torch.cat(pair, -1)
    return torch.cat((turned, rest), -1).to(x.dtype).contiguous()


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, neighbours: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    sin = -sin if inverse else sin
    return _turn(q, cos, sin, neighbours), _turn(k, cos, sin, neighbours)


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> None:
    for x in (q, k):
        x.copy_(_turn(x, cos, sin, neighbours))
