"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.kernels.rope import rope


class RotaryEmbedding(nn.Module):
    """Turns queries and keys by their positions (Su et al., 2021); see ``pipekern.kernels.rope``.

    The first ``dim`` values of each head turn, by angles position · base^(−2i/dim), made in float32. Pairs are
    (i, i + dim/2), or (2i, 2i + 1) with ``neighbours``. Nothing is in the ``state_dict``. Differentiable once.
    """

    def __init__(self, dim: int, base: float = 10000.0, neighbours: bool = False):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ConfigError(f"dim={dim}; values turn in pairs: give an even number of them, at least 2")
        self.dim, self.base, self.neighbours = dim, base, neighbours

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``q`` and ``k`` [B, S, heads, d], any strides; ``positions`` [S] or [B, S], by default 0 to S − 1."""
        if positions is None:
            positions = torch.arange(q.shape[1], device=q.device)
        exponents = torch.arange(0, self.dim, 2, device=q.device, dtype=torch.float32) / self.dim
        angles = positions.unsqueeze(-1) * self.base**-exponents
        return rope(q, k, angles.cos(), angles.sin(), self.neighbours)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.dim}, base={self.base}, neighbours={self.neighbours}"
