"""Many sums at once beside torch._foreach_add_."""

from __future__ import annotations

import pytest
import torch

from pipekern.kernels.accumulate import accumulate_
from pipekern.kernels.table import CHUNK, Table

from .accuracy import DTYPES

SIZES = (1, 2047, 2048, 5000, 0, CHUNK + 3)


def test_golden(device: str) -> None:
    main, grads = [torch.tensor([1.0, 2.0], device=device)], [torch.tensor([0.5, -2.0], device=device).bfloat16()]
    accumulate_(Table(main, grads))
    assert main[0].tolist() == [1.5, 0.0]
    assert grads[0].tolist() == [0.5, -2.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_torch(dtype: torch.dtype, device: str) -> None:
    """The same bits; tensors that are not 16-byte aligned or not in row-major order are right, too."""
    main = [torch.randn(size, device=device) for size in SIZES]
    main += [torch.randn(2049, device=device)[1:], torch.randn(30, 50, device=device).T]
    grads = [torch.randn_like(t).to(dtype) for t in main]
    want = [t.clone() for t in main]
    torch._foreach_add_(want, [grad.float() for grad in grads])
    accumulate_(Table(main, grads))
    assert all(map(torch.equal, main, want))


def test_nothing_beside_is_touched(device: str) -> None:
    memory = torch.zeros(3000, device=device)
    accumulate_(Table([memory[100:2900]], [torch.ones(2800, device=device)]))
    assert memory.sum().item() == 2800
    assert not memory[:100].any()
    accumulate_(Table([], []))
