"""Where a benchmark ran, and what memory and products reach there."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import time
from typing import NamedTuple

import torch

from pipekern._version import __version__
from pipekern.cli.bench.clock import clocked

PEERS = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "apex")


class Rates(NamedTuple):
    """``copy``: bytes read and written a second by a copy of 1 GiB; ``product``: operations a second of a bfloat16
    product of 8192 × 8192 × 8192; ``least``: microseconds of a launch that does next to nothing.
    """

    copy: float
    product: float
    least: float


def rates() -> Rates:
    """Measured now, on the current CUDA device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    one = torch.zeros(1, device="cuda")
    copied = clocked(lambda _: target.copy_(source)).gpu_us
    multiplied = clocked(lambda _: torch.mm(a, b)).gpu_us
    return Rates(2 * 2**30 / copied * 1e6, 2 * 8192**3 / multiplied * 1e6, clocked(lambda _: one.add_(1)).gpu_us)


def describe(measured: Rates | None) -> dict[str, str]:
    """Date, versions, GPU and its measured rates."""
    versions = {name: _version(name) for name in PEERS}
    there = {"date": time.strftime("%Y-%m-%d"), "pipekern": __version__, "python": platform.python_version()}
    there |= {name: version for name, version in versions.items() if version}
    if measured is None:
        return there | {"gpu": "none: times are not measured; the errors are those of the CPU's kernels"}
    return there | {
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver(),
        "copy": f"{measured.copy / 1e9:.4g} GB/s, read and written",
        "product": f"{measured.product / 1e12:.4g} TFLOP/s, bfloat16",
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: no nvidia-smi"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
