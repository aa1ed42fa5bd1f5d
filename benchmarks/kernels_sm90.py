"""What the compiler makes of every kernel for an H100 or H200, without one: registers, memory, loads.

    python -m benchmarks.kernels_sm90 [--out benchmarks/results/kernels_sm90.csv]

Launches are recorded at the sizes of language models, with tensors that have no memory, then compiled ahead of time for
compute capability 9.0 by the tools that come with Triton. One row a kernel, dtype and size.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


class Call(NamedTuple):
    """A launch that was not made: the kernel, its arguments by name, its options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


class Code(NamedTuple):
    """What a call compiles to; bytes of shared memory a block and of stack (spills) a thread."""

    ptx: str
    registers: int
    shared: int
    stack: int


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Launches within are recorded, not made."""
    calls: list[Call] = []
    original = JITFunction.run

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        names = [parameter.name for parameter in self.params]
        named = dict(zip(names, arguments, strict=False))
        named.update({name: options.pop(name) for name in names if name in options})
        calls.append(Call(self, named, options))

    JITFunction.run = record
    try:
        yield calls
    finally:
        JITFunction.run = original


def compile_call(call: Call) -> Code:
    """The call as Triton would specialise it: what is None or 1 compiled in, what divides by 16 known to."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(call.kernel.params):
        value = call.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[i,] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]] if value.data_ptr() % 16 == 0 else []
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            attributes[i,] = [["tt.divisibility", 16]] if value % 16 == 0 else []
    source = ASTSource(call.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGET, options=call.options)
    return Code(compiled.asm["ptx"], *resources(compiled.asm["cubin"]))


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers a thread, bytes of shared memory a block, bytes of stack a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return found["REG"], found["SHARED"], found["STACK"] + found["LOCAL"]
