"""The casts of CUDA links: their bodies, compiled for the host, against torch; and what nvcc makes of the kernels."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.transport import fake_cuda

KERNELS = fake_cuda.ROOT / "csrc/cuda/kernels"
GROUP = 128


def run(name: str, tensor: Tensor, slot: Tensor) -> None:
    """Run a kernel over all of ``tensor``."""
    casts = ctypes.CDLL(fake_cuda.library("casts", "libcasts.so"))
    address = [ctypes.c_void_p(t.data_ptr()) for t in (tensor, slot)]
    assert casts.run(name.encode(), *address, ctypes.c_ulonglong(tensor.numel())) == 1, name


def poisoned(count: int, dtype: torch.dtype) -> Tensor:
    return torch.full((count * dtype.itemsize,), 0xA5, dtype=torch.uint8).view(dtype)


def slot_for(count: int) -> Tensor:
    """Codes, then from the next multiple of 256 the scales."""
    return poisoned(-(-count // 256) * 256 + 4 * -(-count // GROUP), torch.uint8)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Every bit, but for those that say which NaN it is."""
    bits = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return bool(((left.view(bits) == right.view(bits)) | (left.isnan() & right.isnan())).all())


def all_16_bits(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def some_32_bits(seed: int) -> Tensor:
    """Four million bit patterns, among them those next to every rounding of bfloat16 near 1."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-(2**31), 2**31, (2**22 - 2**18,), generator=g).to(torch.int32)
    near = torch.arange(0x3F800000 - 2**17, 0x3F800000 + 2**17, dtype=torch.int64).to(torch.int32)
    return torch.cat([drawn, near]).view(torch.float32)


def test_golden() -> None:
    values = torch.tensor([1.0, -1.5, 448.0, 0.001] * 32)
    slot = slot_for(128)
    run("pk_put_f32_e4m3", values, slot)
    assert slot[256:].view(torch.float32).tolist() == [1.0]
    assert slot[:4].view(torch.float8_e4m3fn).tolist() == [1.0, -1.5, 448.0, 2**-9]  # the least code
    got = poisoned(128, torch.float32)
    run("pk_take_e4m3_f32", got, slot)
    assert got[:4].tolist() == [1.0, -1.5, 448.0, 2**-9]


def test_float32_to_bfloat16_and_back() -> None:
    values = torch.cat([some_32_bits(1), all_16_bits(torch.bfloat16).float()])
    slot = poisoned(values.numel(), torch.bfloat16)
    run("pk_put_f32_bf16", values, slot)
    assert same_bits(slot, values.bfloat16())
    back = poisoned(values.numel(), torch.float32)
    run("pk_take_bf16_f32", back, slot)
    assert same_bits(back, slot.float())


def test_float16_and_float32() -> None:
    halves = all_16_bits(torch.float16)
    floats = poisoned(halves.numel(), torch.float32)
    run("f32_of_f16", floats, halves)
    assert same_bits(floats, halves.float())
    values = torch.cat([some_32_bits(2), torch.randn(2**20) * 1e-5, floats])
    down = poisoned(values.numel(), torch.float16)
    run("f16_of_f32", values, down)
    assert same_bits(down, values.half())


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
def test_e4m3_saturates_and_rounds_as_torch_does(source: torch.dtype) -> None:
    values = some_32_bits(3) if source is torch.float32 else all_16_bits(source).float()
    values = torch.cat([values, torch.randn(2**20) * 100, torch.randn(2**20) * 0.01])
    codes = poisoned(values.numel(), torch.uint8)
    run("e4m3_of_f32", values, codes)
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn)  # torch makes what is beyond NaN
    assert torch.equal(codes[~values.isnan()], expected.view(torch.uint8)[~values.isnan()])
    assert bool(codes[values.isnan()].view(torch.float8_e4m3fn).float().isnan().all())
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    floats = poisoned(256, torch.float32)
    run("f32_of_e4m3", floats, every)
    assert same_bits(floats, every.view(torch.float8_e4m3fn).float())


def grouped(values: Tensor) -> Tensor:
    """float64 of shape (groups, 128), the last one filled up with zeros."""
    padded = torch.zeros(-(-values.numel() // GROUP) * GROUP, dtype=torch.float64)
    padded[: values.numel()] = values.double()
    return padded.view(-1, GROUP)


@pytest.mark.parametrize("name", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("count", [1, 127, 128, 129, 5000])
def test_a_group_of_values_shares_a_power_of_two(name: str, count: int) -> None:
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[name]
    values = (torch.randn(count) * torch.logspace(-4, 4, count)).to(dtype)
    slot = slot_for(count)
    run(f"pk_put_{name}_e4m3", values, slot)
    scales = slot[-(-count // 256) * 256 :].view(torch.float32).double()
    largest = grouped(values).abs().amax(1)
    assert bool((torch.frexp(scales).mantissa == 0.5).all())
    assert bool((largest <= 448 * scales).all()) and bool((largest > 448 * scales / 2).all())
    back = poisoned(count, dtype)
    run(f"pk_take_e4m3_{name}", back, slot)
    error = (grouped(back) - grouped(values)).abs()
    assert bool((error <= grouped(values).abs() / 16 + scales[:, None] * 2**-10).all())  # half a step of 3 bits
    again = slot_for(count)
    run(f"pk_put_{name}_e4m3", back, again)
    twice = poisoned(count, dtype)
    run(f"pk_take_e4m3_{name}", twice, again)
    assert torch.equal(back, twice)  # values that have been cast once are not changed again
    total = back.clone()
    run(f"pk_add_e4m3_{name}", total, slot)
    assert torch.equal(total, (back.float() + back.float()).to(dtype))


def test_nothing_that_is_not_finite_is_hidden() -> None:
    values = torch.zeros(4 * GROUP)
    values[GROUP + 3], values[2 * GROUP + 5] = float("inf"), float("nan")
    slot, back = slot_for(values.numel()), poisoned(values.numel(), torch.float32)
    run("pk_put_f32_e4m3", values, slot)
    run("pk_take_e4m3_f32", back, slot)
    assert bool(back[GROUP : 3 * GROUP].isnan().all())
    assert not back[:GROUP].any() and not back[3 * GROUP :].any()


@pytest.mark.parametrize("name", ["f32", "bf16", "f16"])
def test_adding_without_a_cast(name: str) -> None:
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[name]
    left, right = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype)
    total = left.clone()
    run(f"pk_add_{name}", total, right)
    assert torch.equal(total, left + right)


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: from the PATH, or the one that triton carries."""
    found = shutil.which(name)
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        carried = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        found = str(carried) if carried.exists() else None
    return found


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_what_nvcc_makes_of_the_kernels(architecture: str, tmp_path: Path) -> None:
    nvcc, cuobjdump = tool("nvcc"), tool("cuobjdump")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    cubin = tmp_path / "codec.cubin"
    command = [nvcc, "-cubin", "-O3", "-std=c++17", f"-arch={architecture}", "-Xptxas=-v", "-o", str(cubin)]
    said = subprocess.run([*command, str(KERNELS / "codec.cu")], capture_output=True, text=True, check=True).stderr
    names = re.findall(r"entry function '(\w+)'", said)
    assert len(names) == 15 and all(name.startswith("pk_") for name in names)
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said) == [("0", "0")] * 15
    assert max(int(count) for count in re.findall(r"Used (\d+) registers", said)) <= 32  # eight blocks of 256 an SM
    if cuobjdump is None:
        return
    code = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions = dict(zip(re.findall(r"Function : (\w+)", code), re.split(r"Function : \w+", code)[1:], strict=True))
    for name, text in functions.items():
        assert "LDG.E.128" in text and "STG.E.128" in text, name
        assert "LDL" not in text and "STL" not in text and "F64" not in text and "DADD" not in text, name
        assert ("F2FP.SATFINITE.E4M3" in text) == ("put" in name and "e4m3" in name and architecture == "sm_90"), name
