"""What is written of one measurement."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """None: not measured. ``error`` and ``torch_error`` are relative to the largest value; ``close``: within bounds."""

    op: str
    shape: str
    dtype: str
    contender: str
    direction: str = ""
    mode: str = ""
    gpu_us: float | None = None
    host_us: float | None = None
    launches: int | None = None
    bytes_floor: int | None = None
    pct_of_copy: float | None = None
    pct_of_product: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    torch_error: float | None = None
    close: bool | None = None
    note: str = ""
