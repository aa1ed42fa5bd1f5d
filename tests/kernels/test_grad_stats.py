"""Square sums and non-finite values of many gradients."""

from __future__ import annotations

import math

import pytest
import torch

from pipekern.kernels.grad_stats import grad_stats
from pipekern.kernels.table import CHUNK, Table

from .accuracy import DTYPES, close


def test_golden(device: str) -> None:
    """(3, 4) has the square sum 25; two values of the second are not finite; the third is empty."""
    wrong = torch.tensor([math.nan, 1.0, -math.inf], device=device)
    stats = grad_stats(Table([torch.tensor([3.0, 4.0], device=device), wrong, torch.zeros(0, device=device)]))
    assert stats[0].tolist() == [25.0, 0.0]
    assert stats[1, 1].item() == 2
    assert stats[2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_torch(dtype: torch.dtype, device: str) -> None:
    grads = [torch.randn(size, device=device).to(dtype) for size in (1, 4095, 4096, 9000, 2 * CHUNK + 5)]
    grads += [torch.randn(2049, device=device).to(dtype)[1:], torch.randn(30, 50, device=device).to(dtype).T]
    stats = grad_stats(Table(grads))
    exact = torch.stack([grad.double().square().sum() for grad in grads])
    own = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32).square() for grad in grads])
    close(stats[:, 0], own, exact)
    assert not stats[:, 1].any()


def test_a_row_does_not_depend_on_the_others(device: str) -> None:
    """Bit for bit: a norm over several ranks is that of the unsplit model."""
    grads = [torch.randn(size, device=device) for size in (5000, 7, CHUNK + 9)]
    whole = grad_stats(Table(grads))
    apart = torch.cat([grad_stats(Table(grads[i : i + 1])) for i in range(3)])
    assert torch.equal(whole, apart)
    assert grad_stats(Table([])).shape == (0, 2)
