"""One small call of every op, for what all of them owe: as (op, arguments); tensors that take a gradient are marked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipekern.kernels.accumulate import accumulate_
from pipekern.kernels.adamw_step import adamw_step, hyper_row
from pipekern.kernels.cross_entropy import cross_entropy
from pipekern.kernels.gelu import gelu
from pipekern.kernels.grad_stats import grad_stats
from pipekern.kernels.layer_norm import layer_norm
from pipekern.kernels.linear_backward import linear_backward_input, linear_backward_weight
from pipekern.kernels.linear_cross_entropy import linear_cross_entropy
from pipekern.kernels.pack import pack, packed_bytes, unpack
from pipekern.kernels.rms_norm import rms_norm
from pipekern.kernels.rope import rope, rope_
from pipekern.kernels.swiglu import swiglu
from pipekern.kernels.table import Table

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def _normal(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, device=device).bfloat16().requires_grad_()


def _rms_norm(device: str) -> Case:
    x, residual, weight = (_normal(*shape, device=device) for shape in ((4, 6, 32), (4, 6, 32), (32,)))
    return rms_norm, (x, weight, 1e-5, residual)


def _layer_norm(device: str) -> Case:
    x, weight, bias = (_normal(*shape, device=device) for shape in ((4, 6, 32), (32,), (32,)))
    return layer_norm, (x, weight, bias, 1e-5)


def _swiglu(device: str) -> Case:
    return swiglu, (_normal(4, 6, 32, device=device), _normal(4, 6, 32, device=device))


def _swiglu_packed(device: str) -> Case:
    return swiglu, (_normal(4, 6, 32, device=device),)


def _gelu(device: str) -> Case:
    return gelu, (_normal(4, 6, 32, device=device), _normal(32, device=device), "tanh")


def _rope(device: str) -> Case:
    turn = torch.rand(6, 8, device=device)
    return rope, (_normal(2, 6, 4, 16, device=device), _normal(2, 6, 2, 16, device=device), turn.cos(), turn.sin())


def _rope_(device: str) -> Case:
    return rope_, tuple(t.detach() for t in _rope(device)[1])


def _cross_entropy(device: str) -> Case:
    logits, target = _normal(6, 50, device=device), torch.randint(50, (6,), device=device)
    return partial(cross_entropy, z_loss=1e-3, label_smoothing=0.1), (logits, target)


def _cross_entropy_overwrite(device: str) -> Case:
    logits, target = _normal(6, 50, device=device), torch.randint(50, (6,), device=device)
    return lambda x, y: cross_entropy(x * 2, y, overwrite=True), (logits, target)


def _linear_cross_entropy(device: str) -> Case:
    x, weight, target = (
        _normal(6, 8, device=device),
        _normal(50, 8, device=device),
        torch.randint(50, (6,), device=device),
    )
    return linear_cross_entropy, (x, weight, target)


def _linear_cross_entropy_main_grad(device: str) -> Case:
    _, (x, weight, target) = _linear_cross_entropy(device)
    main_grad, scale = torch.ones(50, 8, device=device), torch.tensor(0.75, device=device)

    def call(x: Tensor, weight: Tensor, target: Tensor, main_grad: Tensor, scale: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target, main_grad=main_grad, grad_scale=scale)

    return call, (x, weight, target, main_grad, scale)


def _linear_backward_input(device: str) -> Case:
    return linear_backward_input, (_normal(6, 8, device=device).detach(), _normal(8, 10, device=device).detach())


def _linear_backward_weight(device: str) -> Case:
    dy, x = (_normal(6, n, device=device).detach() for n in (8, 10))
    return linear_backward_weight, (dy, x, torch.ones(8, 10, device=device))


def _pack(device: str) -> Case:
    x = _normal(6, 200, device=device).detach()
    slot = torch.zeros(packed_bytes(x.shape, torch.float8_e4m3fn), dtype=torch.uint8, device=device)
    return lambda x, slot: pack(x, torch.float8_e4m3fn, slot), (x, slot)


def _unpack(device: str) -> Case:
    x = _normal(6, 200, device=device).detach()
    return lambda slot, out: unpack(slot, out, accumulate=True), (pack(x), torch.ones_like(x))


def _lists(count: int, device: str) -> list[list[Tensor]]:
    return [[torch.randn(shape, device=device) for shape in ((5, 8), (2100,))] for _ in range(count)]


def _accumulate(device: str) -> Case:
    main, grads = _lists(2, device)
    table = Table(main, grads)
    return lambda main, grads: accumulate_(table), (main, grads)


def _grad_stats(device: str) -> Case:
    (grads,) = _lists(1, device)
    table = Table(grads)
    return lambda grads: grad_stats(table), (grads,)


def _adamw_step(device: str) -> Case:
    params, grads, means, squares = _lists(4, device)
    squares = [t.square() for t in squares]
    copies = [t.bfloat16() for t in params]
    table = Table(params, grads, means, squares, copies)
    hyper, progress = torch.tensor([hyper_row(0.1)], device=device), torch.zeros(2, dtype=torch.int32, device=device)

    def step(*state: list[Tensor], progress: Tensor) -> None:
        adamw_step(table, hyper, progress, zero_grads=True)

    return lambda progress, *state: step(*state, progress=progress), (progress, params, grads, means, squares, copies)


CASES: dict[str, Callable[[str], Case]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "swiglu": _swiglu,
    "swiglu packed": _swiglu_packed,
    "gelu": _gelu,
    "rope": _rope,
    "rope_": _rope_,
    "cross_entropy": _cross_entropy,
    "cross_entropy overwrite": _cross_entropy_overwrite,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy main_grad": _linear_cross_entropy_main_grad,
    "linear_backward_input": _linear_backward_input,
    "linear_backward_weight": _linear_backward_weight,
    "pack": _pack,
    "unpack": _unpack,
    "accumulate_": _accumulate,
    "grad_stats": _grad_stats,
    "adamw_step": _adamw_step,
}
