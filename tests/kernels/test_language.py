"""Kernels where Triton is missing, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipekern import ConfigError
from pipekern.kernels import rms_norm
from pipekern.kernels.language import check_floats, launch

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys
sys.modules["triton"] = None
import torch
from pipekern import ConfigError
from pipekern.kernels import (accumulate, adamw_step, cross_entropy, gelu, grad_stats, layer_norm, linear_backward,
                              linear_cross_entropy, pack, rms_norm, rope, swiglu)
x = torch.tensor([[3.0, 4.0]], requires_grad=True)
rms_norm.rms_norm(x, None, 0.0).sum().backward()
adamw_step.hyper_row(0.1)
try:
    rms_norm._kernel(x.detach(), None, None, 0.0)
except ConfigError as error:
    assert "pip install triton" in str(error)
else:
    raise AssertionError("a kernel without Triton")
"""


def test_without_triton() -> None:
    """Everything imports, the twins run, and a kernel names the mend."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_double_precision_is_for_the_twins() -> None:
    """A GPU's kernels refuse float64; the CPU computes in it."""
    with pytest.raises(ConfigError, match=r"x is torch.float64; kernels take float32, bfloat16 and float16: cast it"):
        check_floats(weight=None, x=torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"x is torch.float64"):
        rms_norm._kernel(torch.zeros(2, 2, dtype=torch.float64), None, None, 0.0)


def test_nothing_to_do_launches_nothing() -> None:
    launch(None, 0, 4)
