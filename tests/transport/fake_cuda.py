"""The stand-in CUDA driver for tests of the transport: built once, loaded by a rank before the extension looks for one.

Tensors are of the CPU, which is then the "device": its current stream is the driver's default stream, which the
stand-in runs in the calling thread, so that torch's CPU operations are in order with it.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from pipekern.runtime import codecs
from pipekern.transport import open as opening

# Straight into a peer's memory, through host memory, and with waits on the host; every second rank on the CPU.
KNOBS = {
    "fake-cuda": {"jitter": 200},
    "fake-cuda-staged": {"no_ipc": 1, "jitter": 50},
    "fake-cuda-host": {"no_stream_ops": 1, "one_queue": 1},
    "fake-mixed-odd": {"jitter": 200},
    "fake-mixed-even": {"one_queue": 1, "jitter": 50},
}
# By rank, modulo 2.
_ON_CPU = {"fake-mixed-odd": 1, "fake-mixed-even": 0}
ROOT = Path(__file__).parents[2]
_SOURCES = sorted([*(ROOT / "tests/csrc/cuda").glob("*.*"), *(ROOT / "csrc/cuda").rglob("*.h")])


@functools.cache
def library(source: str = "fake_driver", name: str = "libcuda.so.1") -> str:
    """The path of a source of tests/csrc/cuda built as ``name``; skips the test without a C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("the stand-in driver needs a C++ compiler")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in _SOURCES)).hexdigest()[:16]
    target = ROOT / "build" / f"stand-in-{digest}" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", f"-Wl,-soname,{name}"]
        path = str(ROOT / f"tests/csrc/cuda/{source}.cpp")
        subprocess.run([*shlex.split(compiler), *flags, f"-I{ROOT / 'csrc'}", path, "-o", str(staged)], check=True)
        os.replace(staged, target)
    return str(target)


def real_name(transport: str) -> str:
    """What ``transport`` is called outside of tests."""
    return "cuda" if transport in KNOBS else transport


def load(transport: str) -> Callable[[], str]:
    """Load the stand-in for one of ``KNOBS`` into this process, which then takes the CPU for a CUDA device.

    Returns what tells what has not been given back to the driver; for other transports, nothing at all.
    """
    if transport not in KNOBS:
        return str
    os.environ["FAKE_CUDA"] = ",".join(f"{name}={value}" for name, value in KNOBS[transport].items())
    driver = ctypes.CDLL(library(), mode=os.RTLD_NOW | os.RTLD_GLOBAL)
    ctypes.CDLL(library("fake_nvrtc", "libnvrtc.so.13"))  # for a build without nvcc
    driver.fake_leaks.restype = ctypes.c_char_p
    opening.device_obstacle = lambda device: ""
    for module in (opening, codecs):
        setattr(module, "hosts", functools.partial(_hosts, _ON_CPU.get(transport)))  # noqa: B010  # not its own

    def leaks() -> str:
        gc.collect()
        return str(driver.fake_leaks().decode())

    return leaks


def _hosts(on_cpu: int | None, devices: Sequence[torch.device]) -> frozenset[int]:
    return frozenset(rank for rank in range(len(devices)) if rank % 2 == on_cpu)
