"""A linear layer and the cross entropy of its product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipekern.kernels.linear_cross_entropy import linear_cross_entropy


class LinearCrossEntropyLoss(nn.Module):
    """Cross entropy of ``linear(input)`` without the logits of all tokens.

    See ``pipekern.kernels.linear_cross_entropy``. Arguments and names in the ``state_dict`` are those of
    ``torch.nn.LinearCrossEntropyLoss`` (torch 2.13), as far as targets are class indices without class weights. It
    differs as :class:`CrossEntropyLoss` does.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ):
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """``input`` [..., in_features], ``target`` [...]; 0-d, float32 at least."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            bias=self.linear.bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"reduction={self.reduction}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
