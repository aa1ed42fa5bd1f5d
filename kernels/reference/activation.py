"""Twins of the activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .norm import statistics


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return gate.to(statistics(gate)), up.to(statistics(gate))


def swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    g, u = _halves(gate, up)
    return (F.silu(g) * u).to(gate.dtype).contiguous()


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> Tensor:
    g, u = _halves(gate, up)
    s = torch.sigmoid(g)
    return torch.cat((dy * u * s * (1 + g * (1 - s)), dy * g * s), -1).to(gate.dtype).contiguous()


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    wide = x.to(statistics(x))
    return wide if bias is None else wide + bias


def gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return F.gelu(_biased(x, bias), approximate=approximate).to(x.dtype).contiguous()


def gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    v = _biased(x, bias)
    dx = torch.ops.aten.gelu_backward(dy.to(v.dtype), v, approximate=approximate)
    db = x.new_empty(0) if bias is None else dx.sum_to_size(bias.shape).to(bias.dtype, copy=True)
    return dx.to(x.dtype).contiguous(), db
