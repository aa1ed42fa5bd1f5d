"""Every kernel compiled for an H100 or H200, without one: what the machine code must be and must not be."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipekern.kernels.language import INTERPRETED

if importlib.util.find_spec("triton") is None or INTERPRETED:
    pytest.skip("needs Triton's compiler: pip install triton", allow_module_level=True)

from benchmarks import kernels_sm90
from benchmarks.kernels_sm90 import SIZES, compile_call, measure, meta, recorded
from pipekern.kernels import cross_entropy, gelu, layer_norm, pack, rms_norm, swiglu

KERNELS = Path(__file__).parents[2] / "kernels"
NARROW = {"grad_stats._totals"}  # strided partial sums, a few hundred of them


def check(rows: list[dict[str, object]]) -> None:
    for row in rows:
        assert row["f64"] == 0, row
        assert row["stack_bytes"] == 0, row
        assert row["wide_loads"] or row["kernel"] in NARROW, row


def test_golden() -> None:
    """SwiGLU in bfloat16, 32 elements a thread: 8 loads and 4 stores of 16 bytes, and no other."""
    x = meta(8192, 4096, dtype=torch.bfloat16)
    with recorded() as calls:
        swiglu._kernel(x, x)
    ptx = compile_call(calls[0]).ptx
    assert len(re.findall(r"ld\.global[\w.:]*\.v4", ptx)) == len(re.findall(r"ld\.global", ptx)) == 8
    assert len(re.findall(r"st\.global[\w.:]*\.v4", ptx)) == len(re.findall(r"st\.global", ptx)) == 4


@pytest.mark.parametrize("calls", SIZES, ids=lambda calls: calls.__name__)
def test_no_double_precision_no_spills_wide_loads(calls: kernels_sm90.Calls) -> None:
    """One size of bfloat16; ``make test-all`` has them all."""
    check(measure(torch.bfloat16, calls, SIZES[calls][-1]))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("calls", SIZES, ids=lambda calls: calls.__name__)
def test_all_sizes(calls: kernels_sm90.Calls, dtype: torch.dtype) -> None:
    for size in SIZES[calls]:
        check(measure(dtype, calls, size))


def test_no_kernel_is_left_out() -> None:
    """What is launched anywhere in kernels/ is in the record."""
    launched = set()
    for path in KERNELS.glob("*.py"):
        names = re.findall(r"launch\(\s*(\w+),", path.read_text())
        launched |= {f"{path.stem}.{name}" for name in names if name.startswith("_")}
    launched |= {"pack._pack", "pack._unpack"}  # by a variable
    with recorded() as calls:
        for call, sizes in SIZES.items():
            call(torch.bfloat16, sizes[0])
    assert {f"{call.kernel.__module__.rpartition('.')[2]}.{call.kernel.__name__}" for call in calls} == launched


@pytest.mark.parametrize(
    ("dtype", "columns", "width"),
    [
        (torch.bfloat16, 1000, ".v4.b32"),
        (torch.bfloat16, 4104, ".v4.b32"),
        (torch.float32, 4100, ".v4.b32"),
        (torch.bfloat16, 4100, ".v2.b32"),
        (torch.bfloat16, 50, ".b32"),
        (torch.bfloat16, 4099, ".b16"),
    ],
)
def test_rows_of_any_length_have_the_widest_loads_that_they_allow(dtype: torch.dtype, columns: int, width: str) -> None:
    """16 bytes where these divide a row, 8, 4 or 2 where only they do: for Triton alone it must be 16 elements."""
    x = meta(64, columns, dtype=dtype)
    with recorded() as calls:
        rms_norm._kernel(x, None, None, 1e-6)
        swiglu._kernel(x, x)
        pack._kernel(x, meta(pack.packed_bytes(x.shape, torch.bfloat16), dtype=torch.uint8), False)
    for call in calls:
        assert set(re.findall(r"ld\.global([\w.:]*)", compile_call(call).ptx)) == {width}


class Computed(TorchDispatchMode):
    """Operators of torch that launch a kernel of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        views = any(a.alias_info and not a.alias_info.is_write for a in function._schema.arguments)
        if not views and "empty" not in str(function) and "promote_types" not in str(function):
            self.names.append(str(function))
        return function(*arguments, **(options or {}))


def launches(run: Callable[[Tensor, Tensor, Tensor], None]) -> list[str]:
    """Names of all that is launched for x, a weight and targets."""
    with Computed() as seen, recorded() as calls:
        run(meta(64, 256, dtype=torch.bfloat16), meta(256), meta(64, dtype=torch.int64))
    return [f"{call.kernel.__module__.rpartition('.')[2]}{call.kernel.__name__}" for call in calls] + seen.names


def test_launches_forward() -> None:
    """One an op; the mean over tokens is a second one."""

    def run(x: Tensor, weight: Tensor, target: Tensor) -> None:
        rms_norm._kernel(x, weight, x, 1e-6)
        layer_norm._kernel(x, weight, weight, x, 1e-6)
        swiglu._kernel(x, x)
        gelu._kernel(x, weight, "none")
        cross_entropy._kernel(x, target, None, -100, 0.0, 0.0, "mean", False)

    assert launches(run) == [
        "rms_norm_forward",
        "layer_norm_forward",
        "swiglu_forward",
        "gelu_forward",
        "cross_entropy_forward",
        "cross_entropy_reduce",
    ]


def test_launches_backward() -> None:
    """One an op; where there are gradients of weights, their sum over programs is a second one."""

    def run(x: Tensor, weight: Tensor, target: Tensor) -> None:
        rms_norm._backward_kernel(x, None, x, weight, meta(64, 1))
        layer_norm._backward_kernel(x, None, x, weight, weight, meta(64, 2))
        gelu._backward_kernel(x, x, weight, "none")
        swiglu._backward_kernel(x, x, x)
        cross_entropy._backward_kernel(meta(), x, target, meta(64, 4), meta(), 0.0, 0.0)

    assert launches(run) == [
        "rms_norm_backward",
        "partials_add_up",
        "layer_norm_backward",
        "partials_add_up",
        "gelu_backward",
        "partials_add_up",
        "swiglu_backward",
        "cross_entropy_backward",
    ]


@pytest.mark.parametrize("in_place", [False, True])
def test_odd_vocabularies_have_wide_loads(in_place: bool) -> None:
    """GPT-2's 50257: rows begin anywhere, and all blocks but the last of a row are read 16 bytes at a time."""
    logits, target, stats = meta(64, 50257, dtype=torch.bfloat16), meta(64, dtype=torch.int64), meta(64, 4)
    backward = cross_entropy._backward_in_place if in_place else cross_entropy._backward_kernel
    with recorded() as calls:
        cross_entropy._kernel(logits, target, None, -100, 0.0, 0.0, "none", False)
        backward(meta(), logits, target, stats, meta(), 0.0, 0.0)
    codes = [compile_call(call) for call in calls]
    assert [len(re.findall(r"ld\.global[\w.:]*\.v4", code.ptx)) for code in codes] == [2, 2]  # 16 elements a thread
    assert len(re.findall(r"st\.global[\w.:]*\.v4", codes[1].ptx)) == 2
    assert not any(code.stack for code in codes)


def test_more_than_two_to_the_31_elements() -> None:
    """Offsets are 64 bits wide: sizes beyond 2³¹ compile, and their strides are passed as such."""
    x = torch.empty_strided((4, 2048), (2**31, 1), dtype=torch.bfloat16, device="meta")
    with recorded() as calls:
        rms_norm._kernel(x, None, None, 1e-6)
    assert calls[0].arguments["x0"] == 2**31
    assert compile_call(calls[0]).stack == 0
