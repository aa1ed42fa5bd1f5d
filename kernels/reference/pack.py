"""Twins of packing and unpacking."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 128


def pack(x: Tensor, slot: Tensor, float8: bool) -> None:
    columns = x.shape[-1] if x.dim() else 1
    rows = x.reshape(x.numel() // max(columns, 1), columns)
    values, scales = _parts(slot, len(rows), columns, float8)
    if scales is None:
        values.copy_(rows)
        return
    groups = F.pad(rows.float(), (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
    top = torch.where(groups.isfinite(), groups.abs(), torch.inf).amax(-1, keepdim=True)
    scale = top.clamp(min=1e-30) * (1 / 448)
    scaled = torch.where(top.isfinite(), (groups / scale).clamp(-448, 448), 0)
    values.copy_(scaled.flatten(1)[:, :columns].to(torch.float8_e4m3fn))
    scales.copy_(torch.where(top.isfinite(), scale, torch.nan).squeeze(-1))


def unpack(slot: Tensor, out: Tensor, float8: bool, accumulate: bool) -> None:
    columns = out.shape[-1] if out.dim() else 1
    values, scales = _parts(slot, out.numel() // max(columns, 1), columns, float8)
    wide = values.float()
    if scales is not None:
        wide = wide * scales.repeat_interleave(GROUP, 1)[:, :columns]
    wide = wide.view(out.shape)
    out.copy_(out + wide if accumulate else wide)


def _parts(slot: Tensor, rows: int, columns: int, float8: bool) -> tuple[Tensor, Tensor | None]:
    if not float8:
        return slot[: 2 * rows * columns].view(torch.bfloat16).view(rows, columns), None
    start, groups = -(-rows * columns // 16) * 16, -(-columns // GROUP)
    scales = slot[start : start + 4 * rows * groups].view(torch.float32).view(rows, groups)
    return slot[: rows * columns].view(torch.float8_e4m3fn).view(rows, columns), scales
