"""What the compiler makes of every kernel for an H100 or H200, without one: registers, memory, loads.

    python -m benchmarks.kernels_sm90 [--out benchmarks/results/kernels_sm90.csv]

Launches are recorded at the sizes of language models, with tensors that have no memory, then compiled ahead of time for
compute capability 9.0 by the tools that come with Triton. One row a kernel, dtype and size; ``compile_s`` is processor
time, what the first call after an installation waits for.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pipekern.kernels import (
    accumulate,
    adamw_step,
    cross_entropy,
    gelu,
    grad_stats,
    layer_norm,
    pack,
    rms_norm,
    rope,
    swiglu,
    table,
)

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

Calls = Callable[[torch.dtype, int], None]  # launches of a dtype and a size


class Call(NamedTuple):
    """A launch that was not made: the kernel, its arguments by name, its options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


class Code(NamedTuple):
    """What a call compiles to, in ``seconds`` of processor time; bytes of shared memory a block and of stack (spills) a
    thread.
    """

    ptx: str
    seconds: float
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
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]] if value.data_ptr() % 16 == 0 else []
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            attributes[i,] = [["tt.divisibility", 16]] if value % 16 == 0 else []
    source = ASTSource(call.kernel, signature, constants, attributes)
    before = sum(os.times()[:4])  # with that of ptxas, a process of its own
    compiled = triton.compile(source, target=TARGET, options=call.options)
    return Code(compiled.asm["ptx"], sum(os.times()[:4]) - before, *resources(compiled.asm["cubin"]))


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers a thread, bytes of shared memory a block, bytes of stack a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return found["REG"], found["SHARED"], found["STACK"] + found["LOCAL"]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory, which counts as aligned."""
    return torch.empty(shape, dtype=dtype, device="meta")


def on_rows(dtype: torch.dtype, columns: int) -> None:
    """What works on [8192, columns]: norms, activations, packing."""
    x, weight = meta(8192, columns, dtype=dtype), meta(columns, dtype=dtype)
    rms_norm._kernel(x, weight, None, 1e-6)
    rms_norm._kernel(x, weight, x, 1e-6)
    rms_norm._backward_kernel(x, x, x, weight, meta(8192, 1))
    layer_norm._kernel(x, weight, weight, None, 1e-6)
    layer_norm._kernel(x, weight, weight, x, 1e-6)
    layer_norm._backward_kernel(x, x, x, weight, weight, meta(8192, 2))
    swiglu._kernel(x, x)
    swiglu._backward_kernel(x, x, x)
    gelu._kernel(x, weight, "none")
    gelu._backward_kernel(x, x, weight, "none")
    for float8, packed in enumerate(pack.FORMATS):
        slot = meta(pack.packed_bytes(x.shape, packed), dtype=torch.uint8)
        pack._kernel(x, slot, bool(float8))
        pack._unpack_kernel(slot, x, bool(float8), True)


def on_heads(dtype: torch.dtype, size: int) -> None:
    """Rotation of 32 and 8 heads of 4 · 2048 positions."""
    q, k = meta(4, 2048, 32, size, dtype=dtype), meta(4, 2048, 8, size, dtype=dtype)
    angles = meta(2048, size // 2)
    rope._kernel(q, k, angles, angles, False, False)
    rope._kernel(q, k, angles, angles, True, True)
    rope._kernel_in_place(q, k, angles, angles, False)


def on_logits(dtype: torch.dtype, vocabulary: int) -> None:
    """The loss of 8192 tokens, plain and with smoothing and z-loss."""
    logits, target, stats = meta(8192, vocabulary, dtype=dtype), meta(8192, dtype=torch.int64), meta(8192, 4)
    for smoothing, z_loss in ((0.0, 0.0), (0.1, 1e-4)):
        cross_entropy._kernel(logits, target, None, -100, smoothing, z_loss, "mean", False)
        cross_entropy._backward_in_place(meta(), logits, target, stats, meta(), smoothing, z_loss)


def on_tables(dtype: torch.dtype, elements: int) -> None:
    """Sums, square sums and the optimizer over one tensor, its gradients in float32 or in ``dtype``."""
    wide, low = [meta(elements)], [meta(elements, dtype=dtype)]
    owners, progress = meta(elements // table.CHUNK, dtype=torch.int32), meta(2, dtype=torch.int32)
    rows = [meta(1, 3 + columns, dtype=torch.int64) for columns in range(6)]
    kept = torch.zeros(5, dtype=torch.int64)  # the address of a tensor without memory
    accumulate._kernel(wide, low, rows[2], owners, kept[:2])
    grad_stats._kernel(low, rows[1], owners, kept[:1])
    scalars = (meta(1, 8), progress, meta(300, 2), meta())
    adamw_step._kernel(wide, wide, wide, wide, low, rows[5], owners, kept, *scalars, False, True)
    rounded = dtype == torch.bfloat16
    adamw_step._kernel(low, low, wide, wide, [], rows[4], owners, kept[:4], *scalars, rounded, False)


SIZES: dict[Calls, tuple[int, ...]] = {
    on_rows: (1000, 1024, 4096, 8192, 32768),
    on_heads: (64, 80, 128),
    on_logits: (32768, 50257, 128256),
    on_tables: (2**24,),
}


def measure(dtype: torch.dtype, calls: Calls, size: int) -> list[dict[str, Any]]:
    """Rows of the record."""
    with recorded() as made:
        calls(dtype, size)
    found = []
    for call in made:
        code = compile_call(call)
        found.append({
            "kernel": f"{call.kernel.__module__.rpartition('.')[2]}.{call.kernel.__name__}",
            "dtype": TYPES[dtype],
            "size": size,
            "warps": call.options["num_warps"],
            "registers": code.registers,
            "shared_bytes": code.shared,
            "stack_bytes": code.stack,
            "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v4", code.ptx)),
            "wide_stores": len(re.findall(r"st\.global[\w.:]*\.v4", code.ptx)),
            "f64": code.ptx.count(".f64"),
            "compile_s": round(code.seconds, 2),
            "triton": triton.__version__,
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    triton.knobs.compilation.always_compile = True  # what is in Triton's cache would take no time
    found = [
        row
        for calls, sizes in SIZES.items()
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for size in sizes
        for row in measure(dtype, calls, size)
    ]
    for row in found:
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ")
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, found[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
