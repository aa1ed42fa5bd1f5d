"""Cases of what works on slots, and on all tensors of a model in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pipekern.cli.bench.case import Case, Sizes, timed
from pipekern.kernels.accumulate import accumulate_
from pipekern.kernels.adamw_step import adamw_step, hyper_row
from pipekern.kernels.grad_stats import grad_stats
from pipekern.kernels.pack import pack, packed_bytes, unpack
from pipekern.kernels.table import Table

LR, MAX_NORM = 1e-3, 1.0


def _pack(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    for T, H in product(sizes.tokens, sizes.hidden):
        x = torch.randn(T, H, device=device).to(dtype)

        def ours(x: Tensor) -> Callable[[], Tensor]:
            slot = x.new_empty(packed_bytes(x.shape, torch.bfloat16), dtype=torch.uint8)
            return lambda: pack(x, torch.bfloat16, slot).view(torch.bfloat16).view(x.shape)

        def torchs(x: Tensor) -> Callable[[], Tensor]:
            slot = x.new_empty(x.shape, dtype=x.dtype if x.dtype is torch.float64 else torch.bfloat16)
            return lambda: slot.copy_(x)

        moved = x.numel() * (x.element_size() + 2)
        yield Case("pack", f"{T}×{H}", [x], {"pipekern": ours, "torch": torchs}, moved)


def _unpack(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    for T, H in product(sizes.tokens, sizes.hidden):
        x, there = torch.randn(T, H, device=device).bfloat16(), torch.randn(T, H, device=device).to(dtype)

        def ours(x: Tensor, out: Tensor) -> Callable[[], Tensor]:
            slot = pack(x)
            return lambda: unpack(slot, out, accumulate=True)

        moved = x.numel() * (2 + 2 * there.element_size())
        contenders = {"pipekern": ours, "torch": timed(lambda x, out: out.add_(x))}
        yield Case("unpack", f"{T}×{H}, added", [x, there], contenders, moved)


def _shapes(parameters: int) -> list[int]:
    """Sizes of a model's tensors, large and small in turn."""
    width = max(int((parameters / 24) ** 0.5), 1)
    return [size for _ in range(24) for size in (width * width, width)]


def _accumulate(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    shapes = _shapes(sizes.parameters)
    main = [torch.randn(size, device=device) for size in shapes]
    grads = [torch.randn(size, device=device).to(dtype) for size in shapes]

    def ours(*both: Tensor) -> Callable[[], Sequence[Tensor]]:
        main, grads = _halves(both)
        table = Table(main, grads)

        def run() -> Sequence[Tensor]:
            accumulate_(table)
            return main

        return run

    def torchs(*both: Tensor) -> Callable[[], Sequence[Tensor]]:
        main, grads = _halves(both)

        def run() -> Sequence[Tensor]:
            torch._foreach_add_(main, grads)
            return main

        return run

    moved = sum(shapes) * (8 + grads[0].element_size())
    yield Case("accumulate_", _label(shapes), [*main, *grads], {"pipekern": ours, "torch": torchs}, moved)


def _halves(both: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return list(both[: len(both) // 2]), list(both[len(both) // 2 :])


def _label(shapes: Sequence[int]) -> str:
    return f"{sum(shapes)} in {len(shapes)}"


def _grad_stats(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    shapes = _shapes(sizes.parameters)
    grads = [torch.randn(size, device=device).to(dtype) for size in shapes]

    def ours(*grads: Tensor) -> Callable[[], Tensor]:
        table = Table(grads)
        return lambda: grad_stats(table)

    def torchs(*grads: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            squares = torch.stack(torch._foreach_norm(grads)).square()
            bad = torch.stack([(~g.isfinite()).sum() for g in grads])
            return torch.stack((squares, bad.to(squares.dtype)), 1)

        return run

    moved = sum(shapes) * grads[0].element_size()
    yield Case("grad_stats", _label(shapes), list(grads), {"pipekern": ours, "torch": torchs}, moved)


def _adamw_step(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """float32 parameters and gradients, and copies in ``dtype`` where that is another; clipped by their norm."""
    shapes = _shapes(sizes.parameters)
    params, grads = ([torch.randn(size, device=device) for size in shapes] for _ in range(2))
    copied = dtype is not torch.float32

    def ours(*both: Tensor) -> Callable[[], Any]:
        params, grads = _halves(both)
        means, squares = ([torch.zeros_like(p) for p in params] for _ in range(2))
        columns = [params, grads, means, squares, *([[p.to(dtype) for p in params]] if copied else [])]
        table, of_grads = Table(*columns), Table(grads)
        hyper = torch.tensor([hyper_row(LR, max_norm=MAX_NORM)], device=params[0].device)
        progress = torch.zeros(2, dtype=torch.int32, device=params[0].device)

        def run() -> list[Tensor]:
            adamw_step(table, hyper, progress, grad_stats(of_grads), zero_grads=True)
            return params

        return run

    def torchs(*both: Tensor) -> Callable[[], Any]:
        params, grads = _halves(both)
        copies = [p.to(dtype) for p in params] if copied else []
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer = torch.optim.AdamW(params, LR, fused=True)

        def run() -> list[Tensor]:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
            optimizer.step()
            torch._foreach_zero_(grads)
            if copies:
                torch._foreach_copy_(copies, params)
            return params

        return run

    moved = sum(shapes) * (36 + (dtype.itemsize if copied else 0))
    yield Case("adamw_step", _label(shapes), [*params, *grads], {"pipekern": ours, "torch": torchs}, moved)


LISTS: dict[str, Callable[[Sizes, torch.dtype, str], Iterator[Case]]] = {
    "pack": _pack,
    "unpack": _unpack,
    "accumulate_": _accumulate,
    "grad_stats": _grad_stats,
    "adamw_step": _adamw_step,
}
