"""LayerNorm."""

from __future__ import annotations

from torch import Tensor, nn

from pipekern.kernels.layer_norm import layer_norm
from pipekern.nn.trailing import as_rows


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` in one pass over memory a direction; see ``pipekern.kernels.layer_norm``.

    Statistics are float32, and the result has the dtype of the input, whatever that of the weight. Differentiable once.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., \\*normalized_shape], any strides, normalised."""
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        return layer_norm(as_rows(input, self.normalized_shape), weight, bias, self.eps).view(input.shape)
