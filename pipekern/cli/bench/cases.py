"""What is measured of every op: inputs, ours, torch's and other libraries', and the fewest bytes that must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipekern.cli.bench.case import Case, Sizes, leaf, timed
from pipekern.cli.bench.lists import LISTS
from pipekern.cli.bench.peers import peer, there
from pipekern.kernels.cross_entropy import cross_entropy
from pipekern.kernels.gelu import gelu
from pipekern.kernels.layer_norm import layer_norm
from pipekern.kernels.linear_backward import linear_backward_input, linear_backward_weight
from pipekern.kernels.linear_cross_entropy import linear_cross_entropy
from pipekern.kernels.rms_norm import rms_norm
from pipekern.kernels.rope import rope
from pipekern.kernels.swiglu import swiglu

EPS = 1e-6


def cases(name: str, sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The op's cases, with the same inputs each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield from _OPS[name](sizes, dtype, device)


def _rms_norm(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    liger, apex = peer("liger", "liger_rms_norm"), peer("apex", "fused_rms_norm_affine")
    for T, H in product(sizes.tokens, sizes.hidden):
        x, weight, residual = (leaf(*shape, dtype=dtype, device=device) for shape in ((T, H), (H,), (T, H)))
        n = x.numel() * x.element_size()
        plain = {
            "pipekern": timed(lambda x, w: rms_norm(x, w, EPS)),
            "torch": timed(lambda x, w: F.rms_norm(x, (x.shape[-1],), w, EPS)),
            **there(
                liger=liger and timed(lambda x, w: liger(x, w, EPS, 0.0, "llama", False)),
                apex=apex and timed(lambda x, w: apex(x, w, w.shape, EPS)),
            ),
        }
        yield Case("rms_norm", f"{T}×{H}", [x, weight], plain, 2 * n, 3 * n)
        summed = {
            "pipekern": timed(lambda x, w, r: rms_norm(x, w, EPS, r)),
            "torch": timed(lambda x, w, r: (F.rms_norm(x + r, (x.shape[-1],), w, EPS), x + r)),
        }
        yield Case("rms_norm", f"{T}×{H}, residual", [x, weight, residual], summed, 4 * n, 4 * n)


def _layer_norm(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    liger, apex = peer("liger", "liger_layer_norm"), peer("apex", "fused_layer_norm_affine")
    for T, H in product(sizes.tokens, sizes.hidden):
        shapes = (T, H), (H,), (H,), (T, H)
        x, weight, bias, residual = (leaf(*shape, dtype=dtype, device=device) for shape in shapes)
        n = x.numel() * x.element_size()
        plain = {
            "pipekern": timed(lambda x, w, b: layer_norm(x, w, b, EPS)),
            "torch": timed(lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b, EPS)),
            **there(
                liger=liger and timed(lambda x, w, b: liger(x, w, b, EPS)),
                apex=apex and timed(lambda x, w, b: apex(x, w, b, w.shape, EPS)),
            ),
        }
        yield Case("layer_norm", f"{T}×{H}", [x, weight, bias], plain, 2 * n, 3 * n)
        summed = {
            "pipekern": timed(lambda x, w, b, r: layer_norm(x, w, b, EPS, r)),
            "torch": timed(lambda x, w, b, r: (F.layer_norm(x + r, (x.shape[-1],), w, b, EPS), x + r)),
        }
        yield Case("layer_norm", f"{T}×{H}, residual", [x, weight, bias, residual], summed, 4 * n, 4 * n)


def _swiglu(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    for T, H in product(sizes.tokens, sizes.hidden):
        gate, up = (leaf(T, H, dtype=dtype, device=device) for _ in range(2))
        n = gate.numel() * gate.element_size()
        liger = peer("liger", "liger_swiglu")
        apart = {
            "pipekern": timed(swiglu),
            "torch": timed(lambda gate, up: F.silu(gate) * up),
            **there(liger=liger and timed(liger)),
        }
        yield Case("swiglu", f"{T}×{H}", [gate, up], apart, 3 * n, 5 * n)
        packed = {
            "pipekern": timed(swiglu),
            "torch": timed(lambda both: F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1]),
        }
        both = leaf(T, 2 * H, dtype=dtype, device=device)
        yield Case("swiglu", f"{T}×{H}, packed", [both], packed, 3 * n, 5 * n)


def _gelu(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    for T, H in product(sizes.tokens, sizes.hidden):
        x, bias = leaf(T, H, dtype=dtype, device=device), leaf(H, dtype=dtype, device=device)
        n = x.numel() * x.element_size()
        for how in ("none", "tanh"):
            contenders = {
                "pipekern": timed(gelu, approximate=how),
                "torch": timed(lambda x, b, how=how: F.gelu(x + b, approximate=how)),
            }
            yield Case("gelu", f"{T}×{H}, bias, {how}", [x, bias], contenders, 2 * n, 3 * n)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [B, S, heads, d] turned in plain torch."""
    cos, sin = (torch.cat((t, t), -1).unsqueeze(-2).to(x.dtype) for t in (cos, sin))
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat((-other, one), -1) * sin


def _rope(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    for T, H in product(sizes.tokens, sizes.hidden):
        d = 128 if H >= 1024 else 32
        q = leaf(1, T, H // d, d, dtype=dtype, device=device)
        k = leaf(1, T, max(H // d // 4, 1), d, dtype=dtype, device=device)
        turns = torch.arange(T, device=device).unsqueeze(-1) * 1e4 ** -(torch.arange(0, d, 2, device=device) / d)
        liger = peer("liger", "liger_rope")

        def ligers(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, liger: Any = liger) -> Any:
            twice = (torch.cat((t, t), -1).unsqueeze(0) for t in (cos, sin))
            return [t.transpose(1, 2) for t in liger(q.transpose(1, 2), k.transpose(1, 2), *twice)]

        contenders = {
            "pipekern": timed(rope),
            "torch": timed(lambda q, k, cos, sin: (_turned(q, cos, sin), _turned(k, cos, sin))),
            **there(liger=liger and timed(ligers)),
        }
        n = (q.numel() + k.numel()) * q.element_size()
        yield Case(
            "rope", f"{T}×({q.shape[2]}+{k.shape[2]})×{d}", [q, k, turns.cos(), turns.sin()], contenders, 2 * n, 2 * n
        )


def _cross_entropy(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    for T, V in product(sizes.tokens, sizes.vocabularies):
        logits, target = leaf(T, V, dtype=dtype, device=device), torch.randint(0, V, (T,), device=device)
        n = logits.numel() * logits.element_size()
        liger = peer("liger", "liger_cross_entropy")
        contenders = {
            "pipekern": timed(cross_entropy),
            "torch": timed(F.cross_entropy),
            **there(liger=liger and timed(liger)),
        }
        yield Case("cross_entropy", f"{T}×{V}", [logits, target], contenders, n, 2 * n)


def _linear_cross_entropy(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    for T, V in product(sizes.tokens, sizes.vocabularies):
        H = min(sizes.hidden[-1], 4096)
        x, weight = leaf(T, H, dtype=dtype, device=device), leaf(V, H, dtype=dtype, device=device)
        with torch.no_grad():
            weight.mul_(H**-0.5)
        target = torch.randint(0, V, (T,), device=device)
        liger, cce = peer("liger", "liger_fused_linear_cross_entropy"), peer("cce", "linear_cross_entropy")
        contenders = {
            "pipekern": timed(linear_cross_entropy),
            "torch": timed(lambda x, w, target: F.cross_entropy(F.linear(x, w), target)),
            **there(liger=liger and timed(liger), cce=cce and timed(cce)),
        }
        n = (x.numel() + weight.numel()) * x.element_size()
        yield Case("linear_cross_entropy", f"{T}×{H}×{V}", [x, weight, target], contenders, n, 2 * n, 6 * T * H * V)


def _linear_backward(name: str) -> Callable[[Sizes, torch.dtype, str], Iterator[Case]]:
    def made(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
        for T, H in product(sizes.tokens, sizes.hidden):
            dy, x, weight = (leaf(*shape, dtype=dtype, device=device).detach() for shape in ((T, H), (T, H), (H, H)))
            n, main = x.numel() * x.element_size(), torch.randn(H, H, device=device)
            of_input = {"pipekern": timed(linear_backward_input), "torch": timed(lambda dy, w: dy @ w)}
            if name == "linear_backward_input":
                yield Case(name, f"{T}×{H}×{H}", [dy, weight], of_input, 2 * n, 0, 2 * T * H * H)
            else:
                yield Case(name, f"{T}×{H}×{H}", [dy, x, main], _into(), 2 * n + 8 * H * H, 0, 2 * T * H * H)

    return made


def _into() -> dict[str, Any]:
    def ours(dy: Tensor, x: Tensor, main: Tensor) -> Tensor:
        linear_backward_weight(dy, x, main)
        return main

    def apexs(dy: Tensor, x: Tensor, main: Tensor) -> Tensor:
        wgrad(x, dy, main)
        return main

    wgrad = peer("apex wgrad", "wgrad_gemm_accum_fp32")
    torchs = timed(lambda dy, x, main: main.add_(dy.T @ x))
    return {"pipekern": timed(ours), "torch": torchs, **there(apex=wgrad and timed(apexs))}


_OPS: dict[str, Callable[[Sizes, torch.dtype, str], Iterator[Case]]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "swiglu": _swiglu,
    "gelu": _gelu,
    "rope": _rope,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_backward_input": _linear_backward("linear_backward_input"),
    "linear_backward_weight": _linear_backward("linear_backward_weight"),
    **LISTS,
}
