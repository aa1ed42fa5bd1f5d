"""The two products of a linear layer's backward; the weight's is added to a float32 gradient inside the product.

cuBLAS makes both. Bytes a parameter of the weight's gradient: 8, where a bfloat16 product that is then added takes 12
and a temporary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipekern.errors import ConfigError

from . import reference
from .library import define


def _kernel(dy: Tensor, x: Tensor, main_grad: Tensor, beta: float) -> None:
    rows, columns = dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1])
    if rows.dtype == main_grad.dtype:
        torch.addmm(main_grad, rows, columns, beta=beta, out=main_grad)
    else:
        torch.addmm(main_grad, rows, columns, out_dtype=main_grad.dtype, beta=beta, out=main_grad)


def _input(dy: Tensor, weight: Tensor) -> Tensor:
    dx = dy.new_empty((*dy.shape[:-1], weight.shape[1]))
    torch.mm(dy.reshape(-1, dy.shape[-1]), weight, out=dx.view(-1, weight.shape[1]))  # autocast leaves out= alone
    return dx


define(
    "linear_backward_input(Tensor dy, Tensor weight) -> Tensor",
    twin=_input, kernel=_input, fake=lambda dy, weight: dy.new_empty((*dy.shape[:-1], weight.shape[1])),
)  # fmt: skip
define(
    "linear_backward_weight(Tensor dy, Tensor x, Tensor(a!) main_grad, float beta) -> ()",
    twin=reference.linear_backward_weight, kernel=_kernel, fake=lambda *_: None, interpreted=False,
)  # fmt: skip


def linear_backward_input(dy: Tensor, weight: Tensor) -> Tensor:
    """dy · weight: the gradient of a linear layer's input, in the dtype of ``dy``.

    Args:
        dy: [..., out], the gradient of the output.
        weight: [out, in], of the same dtype.
    """
    return torch.ops.pipekern.linear_backward_input(dy, weight)


def linear_backward_weight(dy: Tensor, x: Tensor, main_grad: Tensor, beta: float = 1.0) -> None:
    """main_grad ← beta · main_grad + dyᵀ · x, summed in float32; with ``beta`` 0 what was there is not read.

    Args:
        dy: [..., out], the gradient of the output; float32, bfloat16 or float16.
        x: [..., in], the input, of the same dtype and leading shape.
        main_grad: [out, in], float32, or the dtype of both.
        beta: Weight of what is there.

    Raises:
        ConfigError: ``main_grad`` has another shape or dtype.
    """
    if main_grad.shape != (dy.shape[-1], x.shape[-1]) or main_grad.dtype not in (torch.float32, dy.dtype):
        raise ConfigError(
            f"main_grad is {tuple(main_grad.shape)} of {main_grad.dtype}; for dy {tuple(dy.shape)} and x "
            f"{tuple(x.shape)} of {dy.dtype} it must be {(dy.shape[-1], x.shape[-1])} of float32"
        )
    torch.ops.pipekern.linear_backward_weight(dy, x, main_grad, beta)
