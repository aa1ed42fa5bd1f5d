"""Rotary embeddings that a forward applies through a function of its module, ``f(q, k, cos, sin)``.

The attention module becomes one whose forward finds the fused function under that name. It reads one half of the
angles, so what makes the angles in that model must repeat them for both halves.
"""

from __future__ import annotations

import copy
import inspect
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from pipekern.kernels.rope import rope
from pipekern.nn.proof import TOLERANCE

_HEADS, _TOKENS, _SIZE = 3, 5, 8


def rotating(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class ``cls`` with the fused function in its forward, or None where that calls no such function."""
    forward = cls.forward
    if not isinstance(forward, FunctionType):
        return None
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        if isinstance(function, FunctionType) and _rotates(function):
            known = {**forward.__globals__, name: _fused(function)}
            own = FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__)
            own.__kwdefaults__, own.__annotations__ = forward.__kwdefaults__, forward.__annotations__
            return type(f"Fused{cls.__name__}", (cls,), {"forward": own, "__module__": __name__})
    return None


def _fused(function: FunctionType) -> Any:
    """``function`` by :func:`rope`, where it is called as it was proven."""

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or cos.dim() != 3:
            return function(q, k, cos, sin, *rest, **named)
        half = cos.shape[-1] // 2
        cos, sin = (t[..., :half].expand(q.shape[0], -1, -1) for t in (cos, sin))
        turned = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)

    return apply


def _rotates(function: FunctionType) -> bool:
    """Whether ``function(q, k, cos, sin)`` turns q and k [B, heads, S, d] by cos and sin [B, S, d], repeated."""
    parameters = list(inspect.signature(function).parameters)
    if parameters[:4] != ["q", "k", "cos", "sin"]:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(2, heads, _TOKENS, _SIZE, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (_HEADS, 1)
    )
    angles = torch.rand(2, _TOKENS, _SIZE // 2, generator=generator, dtype=torch.float64).repeat(1, 1, 2)
    try:
        with torch.enable_grad():
            outputs = [function(q, k, angles.cos(), angles.sin()), _fused(function)(q, k, angles.cos(), angles.sin())]
            grads = [torch.autograd.grad([(x * q).sum() + (y * k).sum()], (q, k)) for x, y in outputs]
    except Exception:  # foreign code, on values that it may not be made for
        return False
    pairs = [*zip(*outputs, strict=True), *zip(*grads, strict=True)]
    return all(a.shape == b.shape and a.dtype == b.dtype and (a - b).abs().max() <= TOLERANCE for a, b in pairs)


def repeats_angles(model: nn.Module) -> bool:
    """Whether what makes angles in ``model`` (by a buffer ``inv_freq``) is there, and repeats them for both halves."""
    makers = [m for m in model.modules() if isinstance(m._buffers.get("inv_freq"), Tensor)]
    return bool(makers) and all(map(_repeats, makers))


@torch.no_grad()
def _repeats(maker: nn.Module) -> bool:
    frequencies: Any = maker._buffers["inv_freq"]
    x = torch.zeros(1, _TOKENS, 1, device=frequencies.device)
    positions = torch.arange(_TOKENS, device=x.device).unsqueeze(0)
    try:
        pair = copy.deepcopy(maker)(x, positions)  # some change with the length they are given
        halves = [t.chunk(2, -1) for t in pair if t.dim() == 3 and t.shape[-1] % 2 == 0]
        return len(halves) == 2 and all(torch.equal(a, b) for a, b in halves)
    except Exception:  # as above, or without memory
        return False
