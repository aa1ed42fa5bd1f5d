"""The products of a linear layer's backward beside autograd's."""

from __future__ import annotations

import pytest
import torch

from pipekern import ConfigError
from pipekern.kernels.language import INTERPRETED
from pipekern.kernels.linear_backward import linear_backward_input, linear_backward_weight

from .accuracy import DTYPES, close

pytestmark = pytest.mark.skipif(INTERPRETED, reason="has no kernel of its own")


def test_golden(device: str) -> None:
    """dy = (1, 2), x = (3, 4): the gradient is their outer product, added to half of what is there."""
    dy, x = torch.tensor([[1.0, 2.0]], device=device), torch.tensor([[3.0, 4.0]], device=device)
    main_grad = torch.full((2, 2), 10.0, device=device)
    linear_backward_weight(dy, x, main_grad, beta=0.5)
    assert main_grad.tolist() == [[8.0, 9.0], [11.0, 13.0]]
    assert linear_backward_input(dy, x.T).tolist() == [[11.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_as_torch(dtype: torch.dtype, beta: float, device: str) -> None:
    """Strided, too; with beta 0 what was there may be NaN."""
    dy = torch.randn(3, 16, 48, device=device).to(dtype)[..., ::2]
    x = torch.randn(16, 3, 32, device=device).to(dtype).transpose(0, 1)
    weight = torch.randn(24, 32, device=device).to(dtype)
    before = torch.randn(24, 32, device=device) if beta else torch.full((24, 32), torch.nan, device=device)
    main_grad = before.clone()
    linear_backward_weight(dy, x, main_grad, beta)
    exact = torch.einsum("bto,bti->oi", dy.double(), x.double())
    plain = torch.einsum("bto,bti->oi", dy.float(), x.float())
    if beta:
        exact, plain = exact + before, plain + before
    close(main_grad, plain, exact)
    close(linear_backward_input(dy, weight), dy @ weight, dy.double() @ weight.double())


def test_nothing_to_add(device: str) -> None:
    main_grad = torch.ones(2, 3, device=device)
    linear_backward_weight(torch.zeros(0, 2, device=device), torch.zeros(0, 3, device=device), main_grad)
    assert torch.equal(main_grad, torch.ones_like(main_grad))


def test_refused(device: str) -> None:
    dy, x = torch.zeros(4, 2, device=device).bfloat16(), torch.zeros(4, 3, device=device).bfloat16()
    with pytest.raises(ConfigError, match=r"it must be \(2, 3\) of float32"):
        linear_backward_weight(dy, x, torch.zeros(3, 2, device=device))
    with pytest.raises(ConfigError, match=r"torch.float16; for dy"):
        linear_backward_weight(dy, x, torch.zeros(2, 3, device=device).half())
