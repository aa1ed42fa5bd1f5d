"""Triton where it is installed, and its launches; nothing else imports it.

Without Triton every op still runs on the CPU. With TRITON_INTERPRET=1 CPU tensors, too, go through the kernels.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from pipekern.errors import ConfigError

triton: Any = None
tl: Any = None
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "yes", "on")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def element(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype that kernels read."""
    return dict(zip(FLOATS, (tl.float32, tl.bfloat16, tl.float16), strict=True))[dtype] if triton else None


def jit(function: Any) -> Any:
    """``triton.jit``; without Triton a function that nothing launches."""
    return function if triton is None else triton.jit(function)


def constant(value: Any) -> Any:
    """A global that kernels may read."""
    return value if triton is None else tl.constexpr(value)


def launch(kernel: Any, programs: int, warps: int, *arguments: Any, **constants: Any) -> None:
    """Run ``programs`` programs of ``kernel``, ``warps`` warps each, on the device of its first argument, a tensor.

    Raises:
        ConfigError: Triton is not installed.
    """
    if not programs:
        return
    if triton is None:
        raise ConfigError("pipekern's kernels need Triton on a GPU, and it is not installed: pip install triton")
    with torch.cuda.device(arguments[0].get_device()):
        # Fused multiply-add is named because Triton 3.10 leaves it out by default.
        kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)


def processors(tensor: torch.Tensor) -> int:
    """Streaming multiprocessors of the tensor's GPU; 4 for the interpreter."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4


def check_floats(**tensors: torch.Tensor | None) -> None:
    """Raises ConfigError where a tensor has a dtype that kernels do not read."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise ConfigError(f"{name} is {tensor.dtype}; kernels take float32, bfloat16 and float16: cast it")


_INTERPRETED = constant(INTERPRETED)


@jit
def narrow(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to the nearest, ties to even; rounded by hand for the interpreter, which does not."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000, bits)
        x = bits.to(tl.float32, bitcast=True)
    if _INTERPRETED and dtype == tl.float8e4nv:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
        coarse = (x + 24576.0) - 24576.0  # multiples of 2⁻⁹, for what is below 2⁻⁶
        x = tl.where(tl.abs(x) < 0.015625, coarse, bits.to(tl.float32, bitcast=True))
    return x.to(dtype)
