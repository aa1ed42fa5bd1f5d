"""Cross entropy."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.kernels.cross_entropy import cross_entropy


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss``; see ``pipekern.kernels.cross_entropy``.

    It differs in three things: the result is float32 at least; a mean over no target at all is 0, not NaN; a target
    that is neither a class nor ``ignore_index`` makes the loss NaN, for an error would stop the host. ``z_loss`` weighs
    the squared log of the partition function. With class weights, or where targets are probabilities, torch's own runs.
    """

    def __init__(self, *args: Any, z_loss: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.z_loss = z_loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """``input`` [N, C, ...] or [C], ``target`` [N, ...] or [], as torch has them."""
        if self.weight is not None or target.is_floating_point():
            if self.z_loss:
                raise ConfigError(f"z_loss={self.z_loss} is for class indices without class weights; leave it out")
            return super().forward(input, target)
        return cross_entropy(
            input.movedim(1, -1) if input.dim() > 1 else input,
            target,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction=self.reduction,
        )
