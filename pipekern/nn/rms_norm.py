"""RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipekern.kernels.rms_norm import rms_norm
from pipekern.nn.trailing import as_rows


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` in one pass over memory a direction; see ``pipekern.kernels.rms_norm``.

    Statistics are float32, and the result has the dtype of the input, whatever that of the weight. Differentiable once.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., \\*normalized_shape], any strides, normalised."""
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
        weight = None if self.weight is None else self.weight.flatten()
        return rms_norm(as_rows(x, self.normalized_shape), weight, eps).view(x.shape)
