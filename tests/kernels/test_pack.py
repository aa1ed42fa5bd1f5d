"""Packing beside casts, and float8 within its own error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipekern import ConfigError
from pipekern.kernels.pack import pack, packed_bytes, unpack

from .accuracy import DTYPES, VIEWS, views

FLOAT8 = torch.float8_e4m3fn
FORMATS = pytest.mark.parametrize("packed", [torch.bfloat16, FLOAT8])


def round_trip(x: Tensor, packed: torch.dtype, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    return unpack(pack(x, packed), torch.empty_like(x) if out is None else out, packed, accumulate)


def test_golden(device: str) -> None:
    """The largest of a group, −4480, becomes −448 with the scale 10; 30 becomes 3. The scale is at byte 16."""
    slot = pack(torch.tensor([30.0, -4480.0], device=device), FLOAT8)
    assert len(slot) == packed_bytes((2,), FLOAT8) == 20
    assert slot[:2].view(FLOAT8).tolist() == [3.0, -448.0]
    assert slot[16:].view(torch.float32).item() == pytest.approx(10.0)
    assert unpack(slot, torch.empty(2, device=device), FLOAT8).tolist() == pytest.approx([30.0, -4480.0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (5, 130), (3, 4, 256), (2, 1100), (0, 7), (4, 0)])
def test_bfloat16_is_a_cast(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    slot = pack(x)
    assert torch.equal(slot.view(torch.bfloat16), x.bfloat16().flatten())
    assert torch.equal(unpack(slot, torch.empty_like(x)), x.bfloat16().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (5, 130), (3, 4, 256), (2, 1100), (0, 7), (4, 0)])
def test_float8_within_half_a_unit(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    """A value keeps four bits, or the group's largest value / 448 / 2⁹ · ½ where it is tiny beside that."""
    x = (torch.randn(shape, device=device) * 10.0 ** torch.randint(-4, 2, shape, device=device)).to(dtype)
    back = round_trip(x.float(), FLOAT8)
    if not x.numel():
        return
    flat = torch.atleast_1d(x).float().reshape(-1, x.shape[-1] if shape else 1)
    for start in range(0, flat.shape[1], 128):
        group, got = flat[:, start : start + 128], back.reshape(flat.shape)[:, start : start + 128]
        scale = group.abs().amax(1, keepdim=True) / 448
        allowed = torch.maximum(group.abs() / 16, scale * 2.0**-10) * (1 + 1e-5)
        assert ((got - group).abs() <= allowed).all()


@FORMATS
@pytest.mark.parametrize("name", VIEWS)
def test_any_strides(name: str, packed: torch.dtype, device: str) -> None:
    x = views(3, 4, 200, dtype=torch.float16, device=device)[name]
    assert torch.equal(pack(x, packed), pack(x.clone(memory_format=torch.contiguous_format), packed))
    out = torch.zeros_like(x) if name != "expanded" else torch.zeros(3, 4, 200, device=device).half()
    assert torch.equal(round_trip(x, packed, out), round_trip(x.contiguous(), packed))


@FORMATS
def test_more_dimensions_than_strides_fit(packed: torch.dtype, device: str) -> None:
    x = torch.randn(2, 3, 2, 3, 2, 160, device=device).permute(4, 2, 0, 3, 1, 5)
    assert torch.equal(pack(x, packed), pack(x.contiguous(), packed))
    assert torch.equal(round_trip(x, packed, torch.empty_like(x)), round_trip(x.contiguous(), packed))


@FORMATS
def test_accumulate(packed: torch.dtype, device: str) -> None:
    """Added in float32, and nothing but the slot's bytes read or written."""
    x, before = torch.randn(5, 130, device=device), torch.randn(5, 130, device=device)
    memory = torch.full((4096,), 0xFF, dtype=torch.uint8, device=device)
    slot = memory[16 : 16 + packed_bytes(x.shape, packed)]
    assert pack(x, packed, out=slot) is slot
    assert (memory[:16] == 0xFF).all()
    assert (memory[16 + len(slot) :] == 0xFF).all()
    plain = unpack(slot, torch.empty_like(x), packed)
    out = before.clone()
    unpack(slot, out, packed, accumulate=True)
    assert torch.equal(out, before + plain)


def test_what_is_not_finite_stays_so(device: str) -> None:
    x = torch.ones(3, 256, device=device)
    x[0, 3], x[1, 200] = math.nan, math.inf
    for packed in (torch.bfloat16, FLOAT8):
        back = round_trip(x, packed)
        assert back.isfinite().all(1).tolist() == [False, False, True]
    assert round_trip(x, FLOAT8)[0, 128:].tolist() == [1.0] * 128
    assert not round_trip(torch.zeros(300, device=device), FLOAT8).any()


def test_refused(device: str) -> None:
    x = torch.zeros(4, 100, device=device)
    with pytest.raises(ConfigError, match=r"dtype=torch.float16; values are packed as one of"):
        pack(x, torch.float16)
    with pytest.raises(ConfigError, match=r"a slot of 799 bytes; \(4, 100\) as torch.bfloat16 takes 800"):
        pack(x, out=torch.empty(799, dtype=torch.uint8, device=device))
    with pytest.raises(ConfigError, match="multiple of 16"):
        unpack(torch.empty(900, dtype=torch.uint8, device=device)[8:], x)
