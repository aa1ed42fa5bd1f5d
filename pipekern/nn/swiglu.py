"""SwiGLU."""

from __future__ import annotations

from torch import Tensor, nn

from pipekern.kernels.swiglu import swiglu


class SwiGLU(nn.Module):
    """silu(gate) · up, of two tensors or of the halves of one; see ``pipekern.kernels.swiglu``. Differentiable once."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """``gate`` and ``up`` [..., F], or both as one tensor [..., 2F], gate first."""
        return swiglu(gate, up)
