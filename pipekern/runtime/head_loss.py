"""The loss of a model that ends in a linear layer, without the logits of all tokens; and which pipelines have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.kernels.language import FLOATS
from pipekern.kernels.linear_cross_entropy import linear_cross_entropy
from pipekern.nn.cross_entropy import CrossEntropyLoss
from pipekern.stage.gradient import gradient_dtype, is_free
from pipekern.stage.head import Head, find_head
from pipekern.stage.unit import Unit

LOSSES = (nn.CrossEntropyLoss, CrossEntropyLoss)


def choose_head(units: Sequence[Unit], loss_fn: Any, wanted: bool | None) -> tuple[Head | None, str]:
    """The head of the last stage, if its product is left to the loss; and what is done, in words."""
    try:
        if not wanted:
            raise ConfigError("fuse_loss is not set, or the last stage is on a CPU")
        if type(loss_fn) not in LOSSES or loss_fn.reduction == "none":
            raise ConfigError("loss_fn is no nn.CrossEntropyLoss or pk.nn.CrossEntropyLoss that sums or averages")
        if loss_fn.weight is not None:
            raise ConfigError("loss_fn has class weights")
        if not units:
            raise ConfigError("the last stage has no layer")
        head = find_head(units[-1])
    except ConfigError as error:
        return None, f"logits of every micro-batch: {error}"
    return head, f"linear_cross_entropy over {head.name}, {head.linear.in_features} → {head.linear.out_features}"


class HeadLoss:
    """The sum of ``loss_fn`` over the product of a head, from its input and the targets.

    They are [T, H] and [T], or [N, H, d] and [N, d] where the head says so. For other shapes, and for targets that are
    probabilities, the product is made, and ``loss_fn`` itself is called on what ``takes`` makes of it.
    """

    def __init__(self, head: Head, loss_fn: Any, takes: Callable[[Any], Any]):
        self._linear, self._transposed = head.linear, head.transposed
        self._loss_fn, self._takes = loss_fn, takes

    def __call__(self, x: Tensor, target: Tensor, scale: float) -> Tensor:
        """``scale`` is the gradient that the result is going to get."""
        linear, loss_fn = self._linear, self._loss_fn
        transposed = self._transposed and x.dim() == 3
        if transposed:
            x = x.transpose(1, 2)
        fits = target.shape == x.shape[:-1] and x.dim() == 2 + transposed and not target.is_floating_point()
        if not fits or (x.is_cuda and x.dtype not in FLOATS):
            logits = linear(x)
            return loss_fn(self._takes(logits.transpose(1, 2) if transposed else logits), target)
        main_grad = self._main_gradient()
        wide = torch.promote_types(x.dtype, torch.float32)
        return linear_cross_entropy(
            x,
            linear.weight,
            target,
            bias=linear.bias,
            ignore_index=loss_fn.ignore_index,
            label_smoothing=loss_fn.label_smoothing,
            z_loss=getattr(loss_fn, "z_loss", 0.0),
            reduction="sum",
            main_grad=main_grad,
            grad_scale=None if main_grad is None else torch.full((), scale, dtype=wide, device=x.device),
        )

    def _main_gradient(self) -> Tensor | None:
        """The weight's float32 gradient, which is added to at once: else one of the weight's size waits for B."""
        weight = self._linear.weight
        if not (torch.is_grad_enabled() and is_free(weight) and gradient_dtype(weight) is torch.float32):
            return None
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight, dtype=torch.float32)
        return weight.grad if weight.grad.layout is torch.strided else None
