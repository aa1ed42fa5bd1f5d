"""Linear layers with a float32 main gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.kernels.linear_backward import linear_backward_input, linear_backward_weight


class Linear(nn.Linear):
    """``torch.nn.Linear`` with ``weight.grad`` in float32 where the weight is bfloat16 or float16.

    ``weight.grad_dtype`` says so: sums over micro-batches and the product itself are float32, without a gradient of the
    weight's dtype in between. A pipeline's W adds to it inside the product. An optimizer must take both dtypes, which
    torch's own do not. Raises ``ConfigError`` with a torch that has no ``Tensor.grad_dtype``. Differentiable once.
    """

    stands_for = nn.Linear  # it computes what that does: a stage may put off the weight's gradient as it does there

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in ``torch.nn.Module``; every weight that comes here gets its ``grad_dtype``."""
        super().register_parameter(name, param)
        if name == "weight":
            _widen(param)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Linear:
        super()._apply(fn, recurse)
        _widen(self.weight)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in_features] · weightᵀ + bias."""
        if self.weight.grad_dtype is self.weight.dtype:
            return super().forward(input)
        if torch.is_autocast_enabled(input.device.type) and input.dtype is not torch.float64:
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return _Product.apply(input, self.weight, self.bias)


def _widen(weight: Tensor | None) -> None:
    if weight is None:
        return
    if not hasattr(weight, "grad_dtype"):
        raise ConfigError(f"torch {torch.__version__} has no Tensor.grad_dtype, which pk.nn.Linear needs; update torch")
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.grad_dtype is not wide and weight.is_leaf:
        weight.grad_dtype = wide


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        used = weight.to(x.dtype)
        ctx.save_for_backward(x, used)
        ctx.of_bias = None if bias is None else bias.dtype
        return F.linear(x, used, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, used = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dw = None
        if of_weight:
            dw = torch.empty_like(used, dtype=torch.float32)
            linear_backward_weight(dy, x, dw, beta=0.0)
        db = dy.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.of_bias) if of_bias else None
        return linear_backward_input(dy, used) if of_x else None, dw, db
