"""What an op costs the host, and how many kernels it launches, without a GPU: ours beside torch's eager mode.

    python -m benchmarks.kernels_host [--out benchmarks/results/kernels_host.csv]

Ours: CPU tensors go to the launchers that CUDA tensors go to, through autograd and the dispatcher; Triton compiles for
compute capability 9.0, finds the compiled kernel and binds the arguments as ever; the last step, the driver's own
launch, does nothing. torch's: its CPU kernels at the same tiny sizes, so that their own work hardly counts. Neither has
the driver's launch, nor CUDA's memory allocator. What torch would launch on a GPU is counted on fake CUDA tensors, as
operators: some launch more than one kernel. Where its CPU runs other operators than its GPU, or a list one by one, its
host time and its backward operators are left empty.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks import record
from pipekern.kernels import language

language.INTERPRETED = True  # before the ops are registered: CPU tensors go to the launchers

from pipekern.cli.bench.accuracy import as_list  # noqa: E402
from pipekern.cli.bench.case import Case, Sizes  # noqa: E402
from pipekern.cli.bench.cases import cases  # noqa: E402
from pipekern.cli.bench.lists import LISTS  # noqa: E402

TINY = Sizes((1,), (128,), (128,), 24 * 64)
ROUNDS, CALLS = 7, 200
OPS = {
    "rms_norm": torch.bfloat16,
    "layer_norm": torch.bfloat16,
    "swiglu": torch.bfloat16,
    "gelu": torch.bfloat16,
    "rope": torch.bfloat16,
    "cross_entropy": torch.bfloat16,
    "linear_cross_entropy": torch.float32,  # products of bfloat16 into float32 are the GPU's alone
    "pack": torch.bfloat16,
    "unpack": torch.bfloat16,
    "accumulate_": torch.bfloat16,
    "grad_stats": torch.bfloat16,
    "adamw_step": torch.bfloat16,
}
NO_KERNEL = {
    f"aten::{name}" for name in ("empty", "new_empty", "empty_like", "_unsafe_view", "promote_types", "atleast_1d")
}


class Driver:
    """Triton's driver of an H200 that is not there: kernels are compiled, loading and launching them does nothing."""

    def __init__(self, launched: list[str]):
        self.launched = launched
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        name = f"{source.fn.__module__.rpartition('.')[2]}.{metadata.name}"
        return lambda *_: self.launched.append(name)


class Seen(TorchDispatchMode):
    """Operators that launch kernels, those within ours too."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.namespace == "pipekern":
            with self:
                return function._op_dk(torch._C.DispatchKey.CPU, *arguments, **(options or {}))
        views = any(a.alias_info and not a.alias_info.is_write for a in function._schema.arguments)
        if function.namespace == "aten" and not views and function._schema.name not in NO_KERNEL:
            self.names.append(function._schema.name)
        return function(*arguments, **(options or {}))


def directions(case: Case, contender: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    run = case.contenders[contender](*case.inputs)
    yield "forward", run
    if case.backward_bytes:
        outputs = as_list(run())
        grads = [torch.ones_like(output) for output in outputs]
        leaves = [value for value in case.inputs if isinstance(value, Tensor) and value.requires_grad]
        yield "backward", lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def seen(run: Callable[[], Any], launched: list[str]) -> list[str]:
    """Names of what a call launches, ours and torch's, in their order."""
    with Seen(launched):
        run()  # compiles, and makes what is made once
        launched.clear()
        run()
    return list(launched)


def on_gpu(name: str, dtype: torch.dtype) -> list[list[str] | None]:
    """Operators of torch's forward on CUDA tensors, a list a case.

    Fake ones, but for lists, whose operators a build without CUDA cannot fake: they are the CPU's if clipping is told
    to take lists whole, as it does on a GPU. RMSNorm such a build takes apart, which CUDA does not: None.
    """
    if name == "rms_norm":
        return [None for _ in cases(name, TINY, dtype, "cpu")]
    if name in LISTS:
        with patch.object(clip_grad, "_has_foreach_support", lambda *_: True):
            return [seen(case.contenders["torch"](*case.inputs), []) for case in cases(name, TINY, dtype, "cpu")]
    with FakeTensorMode(), torch.no_grad():
        return [seen(case.contenders["torch"](*case.inputs), []) for case in cases(name, TINY, dtype, "cuda")]


def microseconds(run: Callable[[], Any], launched: list[str]) -> float:
    """The least, over rounds, of a round's mean."""
    least = float("inf")
    for _ in range(ROUNDS):
        begun = time.process_time()
        for _ in range(CALLS):
            run()
        least = min(least, time.process_time() - begun)
        launched.clear()
    return 1e6 * least / CALLS


def measure(name: str, dtype: torch.dtype, launched: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of an op: both contenders, both directions."""
    for case, gpu in zip(cases(name, TINY, dtype, "cpu"), on_gpu(name, dtype), strict=True):
        for contender in ("pipekern", "torch"):
            comparable = True
            for direction, run in directions(case, contender):
                names = seen(run, launched)
                if contender == "torch" and direction == "forward":
                    comparable = names == gpu and not any("_foreach" in one for one in names)
                    names = gpu or []
                told = Counter(names) if comparable or direction == "forward" else Counter()
                yield {
                    "op": name, "shape": case.shape, "dtype": str(dtype).removeprefix("torch."), "contender": contender,
                    "direction": direction, "launches": told.total() or "",
                    "host_us": round(microseconds(run, launched), 1) if comparable else "",
                    "names": ", ".join(f"{n}× {one}" if n > 1 else one for one, n in told.items()),
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    launched: list[str] = []
    driver.set_active(Driver(launched))
    rows = [row for name, dtype in OPS.items() for row in measure(name, dtype, launched)]
    for row in rows:
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ")
    if args.out:
        machine = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "triton": triton.__version__}
        machine["host_us"] = f"processor time, least of {ROUNDS} means of {CALLS} calls, one thread"
        machine["measured"] = "no GPU: neither the driver's launch nor CUDA's allocator; torch's on its CPU kernels"
        record.write(args.out, machine, rows)


if __name__ == "__main__":
    main()
