"""Twins of the products."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_backward_weight(dy: Tensor, x: Tensor, main_grad: Tensor, beta: float) -> None:
    """Cast first, for torch's CPU product has no output wider than its inputs."""
    rows, columns = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    wide = main_grad.dtype
    torch.addmm(main_grad, rows.T.to(wide), columns.to(wide), beta=beta, out=main_grad)  # autocast leaves out= alone
