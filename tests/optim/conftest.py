"""Where the optimizer runs: on the CPU over the kernels' twins, on a GPU over the kernels."""

from __future__ import annotations

import pytest
import torch

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(7)
    return str(request.param)
