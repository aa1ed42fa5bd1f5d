"""One gradient norm over all stages, the same to the bit however the model is split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from pipekern.parallel.tensor import local
from pipekern.transport.value import by_device


def partials(parameters: Mapping[int, nn.Parameter], norm_type: float) -> torch.Tensor:
    """Rows (index, norm of that parameter's gradient), float64, for the parameters that have one."""
    rows = [(index, _norm(p.grad, norm_type)) for index, p in parameters.items() if p.grad is not None]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)


def _norm(grad: torch.Tensor, norm_type: float) -> float:
    wide = torch.promote_types(grad.dtype, torch.float32)
    return float(torch.linalg.vector_norm(local(grad), norm_type, dtype=wide))


def total_norm(rows: Iterable[torch.Tensor], norm_type: float) -> tuple[torch.Tensor, int]:
    """The norm over all :func:`partials`, summed in the order of their indices (0-d float64), and the index of the
    first that is not finite, -1 where all are.
    """
    table = torch.cat(list(rows))
    table = table[table[:, 0].argsort(stable=True)]
    bad = (~torch.isfinite(table[:, 1])).nonzero()
    total = torch.linalg.vector_norm(table[:, 1], norm_type) if len(table) else torch.zeros((), dtype=torch.float64)
    return total, int(table[bad[0, 0], 0]) if len(bad) else -1


def scale(parameters: Iterable[nn.Parameter], max_norm: float, total: torch.Tensor) -> None:
    """Multiply every gradient by ``max_norm / (total + 1e-6)`` where that is below 1, as
    ``torch.nn.utils.clip_grad_norm_``.
    """
    factor = float(max_norm / (total + 1e-6))
    if factor < 1.0:
        for grads in by_device(local(p.grad) for p in parameters if p.grad is not None):
            torch._foreach_mul_(grads, factor)
