"""GELU."""

from __future__ import annotations

from torch import Tensor, nn

from pipekern.kernels.gelu import gelu


class GELU(nn.GELU):
    """``torch.nn.GELU``; see ``pipekern.kernels.gelu``. The result is contiguous. Differentiable once."""

    def forward(self, input: Tensor) -> Tensor:
        """GELU of each element of ``input``, any shape and strides."""
        return gelu(input, approximate=self.approximate)
