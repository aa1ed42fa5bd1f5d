"""Rotary position embedding of queries and keys, both in one launch. Bytes an element in bfloat16: 4, and 4 backward.

The pair (a, b) of a head becomes (a·cos − b·sin, b·cos + a·sin). Pairs are (i, i + r/2), as in Llama and Hugging Face,
or neighbours (2i, 2i + 1), as in the paper and GPT-J; r = 2 · cos.shape[-1] elements of a head turn, the rest stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipekern.errors import ConfigError

from . import reference
from .language import check_floats, jit, launch, narrow, tl
from .layout import even, step
from .library import define


@jit
def _heads(
    x, x2, x3, y, y2, y3, heads, D, HALF, cos, sin,
    NEIGHBOURS: tl.constexpr, REST: tl.constexpr, STEP: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Turn all heads of one position."""
    pair = tl.arange(0, PAIRS)[None, :].to(tl.int64)
    for first in range(0, heads, HEADS):
        head = (first + tl.arange(0, HEADS)[:, None]).to(tl.int64)
        source = x + even(head * x2, STEP)
        out = y + even(head * y2, STEP)
        if NEIGHBOURS:
            at = tl.arange(0, 2 * PAIRS)[None, :].to(tl.int64)
            mask = (head < heads) & (at < 2 * HALF)
            both = tl.load(source + at * x3, mask, 0).to(tl.float32)
            a, b = tl.split(tl.reshape(both, (HEADS, PAIRS, 2)))
            both = tl.interleave(a * cos - b * sin, b * cos + a * sin)
            tl.store(out + at * y3, narrow(both, y.dtype.element_ty), mask)
        else:
            mask = (head < heads) & (pair < HALF)
            a = tl.load(source + pair * x3, mask, 0).to(tl.float32)
            b = tl.load(source + (pair + HALF) * x3, mask, 0).to(tl.float32)
            tl.store(out + pair * y3, narrow(a * cos - b * sin, y.dtype.element_ty), mask)
            tl.store(out + (pair + HALF) * y3, narrow(b * cos + a * sin, y.dtype.element_ty), mask)
        if REST:
            for start in range(2 * HALF, D, PAIRS):
                mask = (head < heads) & (start + pair < D)
                tl.store(out + (start + pair) * y3, tl.load(source + (start + pair) * x3, mask, 0), mask)


@jit
def _turn(
    q, q0, q1, q2, q3, of_q, u0, u1, u2, u3, k, k0, k1, k2, k3, of_k, v0, v1, v2, v3,
    cos, c0, c1, c2, sin, s0, s1, s2, S, q_heads, k_heads, D, HALF,
    INVERSE: tl.constexpr, NEIGHBOURS: tl.constexpr, REST: tl.constexpr, STEP: tl.constexpr, HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """A program makes all heads of one position of one sample, so that its angles are read once."""
    HALF = even(HALF, STEP)
    batch = tl.program_id(0).to(tl.int64) // S
    time = tl.program_id(0).to(tl.int64) % S
    pair = tl.arange(0, PAIRS)[None, :].to(tl.int64)
    c = tl.load(cos + even(batch * c0 + time * c1, STEP) + pair * c2, pair < HALF, 0).to(tl.float32)
    s = tl.load(sin + even(batch * s0 + time * s1, STEP) + pair * s2, pair < HALF, 0).to(tl.float32)
    if INVERSE:
        s = -s
    q += even(batch * q0 + time * q1, STEP)
    of_q += even(batch * u0 + time * u1, STEP)
    _heads(q, q2, q3, of_q, u2, u3, q_heads, D, HALF, c, s, NEIGHBOURS, REST, STEP, HEADS, PAIRS)
    k += even(batch * k0 + time * k1, STEP)
    of_k += even(batch * v0 + time * v1, STEP)
    _heads(k, k2, k3, of_k, v2, v3, k_heads, D, HALF, c, s, NEIGHBOURS, REST, STEP, HEADS, PAIRS)


def _run(
    q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor, cos: Tensor, sin: Tensor, neighbours: bool, inverse: bool
) -> None:
    check_floats(q=q, k=k, cos=cos, sin=sin)
    B, S, q_heads, D = q.shape
    half = cos.shape[-1]
    cos, sin = cos.expand(B, S, half), sin.expand(B, S, half)
    pairs = 1 << max(half - 1, 0).bit_length()
    heads = min(1 << (q_heads - 1).bit_length(), max(2048 // pairs, 1))
    placed = [(t, *t.stride()) for t in (q, of_q, k, of_k, cos, sin)]
    launch(
        _turn, B * S, max(1, min(heads * pairs // 512, 16)),
        *(value for tensor in placed for value in tensor), S, q_heads, k.shape[2], D, half,
        INVERSE=inverse, NEIGHBOURS=neighbours, REST=2 * half < D and of_q is not q,
        STEP=step(half, *placed), HEADS=heads, PAIRS=pairs,
    )  # fmt: skip


def _kernel(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, neighbours: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    outputs = _fake(q, k, cos, sin, neighbours, inverse)
    _run(q, k, *outputs, cos, sin, neighbours, inverse)
    return outputs


def _kernel_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> None:
    _run(q, k, q, k, cos, sin, neighbours, inverse=False)


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, neighbours: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.neighbours, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    turned = torch.ops.pipekern.rope(dq, dk, *ctx.saved_tensors, ctx.neighbours, not ctx.inverse)
    return *turned, None, None, None, None


define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool neighbours, bool inverse) -> (Tensor, Tensor)",
    twin=reference.rope, kernel=_kernel, fake=_fake, save=_save, backward=_gradients,
)  # fmt: skip
define(
    "rope_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool neighbours) -> ()",
    twin=reference.rope_, kernel=_kernel_in_place, fake=lambda *_: None,
)  # fmt: skip


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ConfigError(f"q is {tuple(q.shape)} and k {tuple(k.shape)}; both must be [B, S, heads, d] of one B, S, d")
    if cos.shape != sin.shape or 2 * cos.shape[-1] > q.shape[-1] or cos.shape[-2] != q.shape[1]:
        raise ConfigError(
            f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}; for q {tuple(q.shape)} both must be [S, r/2] or "
            "[B, S, r/2] with r <= d: where angles are repeated for both halves, pass the first"
        )


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions (Su et al., 2021).

    Args:
        q: [B, S, heads, d], any strides; float32, bfloat16 or float16.
        k: [B, S, heads of its own, d], any strides.
        cos: [S, r/2] or [B, S, r/2], cosines of the angles; no gradient goes there.
        sin: The sines.
        neighbours: Pairs are (2i, 2i + 1), not (i, i + r/2).

    Returns:
        Turned q and k, contiguous, in their dtypes.

    Raises:
        ConfigError: The shapes do not go together.
    """
    _check(q, k, cos, sin)
    return torch.ops.pipekern.rope(q, k, cos, sin, neighbours, False)


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> None:
    """:func:`rope` in place, for tensors that need no gradient.

    Raises:
        ConfigError: The shapes do not go together, or a gradient is needed.
    """
    _check(q, k, cos, sin)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise ConfigError("rope_ works in place and q or k requires a gradient: use rope, or torch.no_grad")
    torch.ops.pipekern.rope_(q, k, cos, sin, neighbours)
