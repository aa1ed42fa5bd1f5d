"""One small call of every op, for what all of them owe: as (op, arguments); tensors that take a gradient are marked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipekern.kernels.gelu import gelu
from pipekern.kernels.layer_norm import layer_norm
from pipekern.kernels.rms_norm import rms_norm
from pipekern.kernels.rope import rope, rope_
from pipekern.kernels.swiglu import swiglu

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


CASES: dict[str, Callable[[str], Case]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "swiglu": _swiglu,
    "swiglu packed": _swiglu_packed,
    "gelu": _gelu,
    "rope": _rope,
    "rope_": _rope_,
}
