"""The twins in float64: their gradients beside finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipekern.kernels.cross_entropy import cross_entropy
from pipekern.kernels.gelu import gelu
from pipekern.kernels.language import INTERPRETED
from pipekern.kernels.layer_norm import layer_norm
from pipekern.kernels.linear_cross_entropy import linear_cross_entropy
from pipekern.kernels.rms_norm import rms_norm
from pipekern.kernels.rope import rope
from pipekern.kernels.swiglu import swiglu

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels do not read float64")
TARGET = torch.tensor([0, 3, -100])
TURN = torch.rand(3, 2, dtype=torch.float64)
SMOOTH = {"label_smoothing": 0.1, "z_loss": 0.01}

OPS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (lambda x, w, r: rms_norm(x, w, 1e-5, r), ((3, 4), (4,), (3, 4))),
    "layer_norm": (lambda x, w, b, r: layer_norm(x, w, b, 1e-5, r), ((3, 4), (4,), (4,), (3, 4))),
    "swiglu": (swiglu, ((3, 4), (3, 4))),
    "swiglu packed": (swiglu, ((3, 4),)),
    "gelu": (gelu, ((3, 4), (4,))),
    "gelu tanh": (lambda x, b: gelu(x, b, "tanh"), ((3, 4), (4,))),
    "rope": (lambda q, k: rope(q, k, TURN.cos(), TURN.sin()), ((2, 3, 2, 5), (2, 3, 1, 5))),
    "rope neighbours": (lambda q, k: rope(q, k, TURN.cos(), TURN.sin(), True), ((2, 3, 2, 5), (2, 3, 1, 5))),
    "cross_entropy": (lambda x: cross_entropy(x, TARGET, **SMOOTH), ((3, 5),)),
    "cross_entropy none": (lambda x: cross_entropy(x, TARGET, reduction="none"), ((3, 5),)),
    "linear_cross_entropy": (
        lambda x, w, b: linear_cross_entropy(x, w, TARGET, bias=b, **SMOOTH),
        ((3, 4), (5, 4), (5,)),
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_gradients(name: str) -> None:
    op, shapes = OPS[name]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(op, inputs)


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(rms_norm(x, None, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="use the module of torch"):
        dx.sum().backward()
