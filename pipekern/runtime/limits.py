"""The memory that a rank may take, as far as the machine tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


def memory_of(module: object, device: torch.device, sharers: int = 1) -> dict[str, Any]:
    """A rank's row for :func:`limits`: what is free on its device now, None where nothing tells, and what the weights
    of ``module`` take there already, a part for each of the ``sharers`` of this process.
    """
    resident = sum(p.nbytes for p in module.parameters() if p.device == device) if isinstance(module, nn.Module) else 0
    return {"device": str(device), "free": _free(device), "resident": resident / sharers}


def limits(rows: Sequence[dict[str, Any]], same_host: Callable[[int, int], bool]) -> list[float] | None:
    """Bytes that each rank may take: an equal share of what is free on its device, and its own weights there; None
    where a rank's is not known.
    """
    if any(row.get("free") is None for row in rows):
        return None
    ranks = range(len(rows))
    sharers = [sum(rows[a]["device"] == rows[b]["device"] and same_host(a, b) for b in ranks) for a in ranks]
    return [row["free"] / count + row["resident"] for row, count in zip(rows, sharers, strict=True)]


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(filter(None, (_free_of_host(), _free_of_group())), default=None)


def _free_of_host(path: Path = Path("/proc/meminfo")) -> int | None:
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _free_of_group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves (cgroup 2), None without one; file pages can be had back."""
    most = folder / "memory.max"
    if not most.exists() or most.read_text().strip() == "max":
        return None
    pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(most.read_text()) - int((folder / "memory.current").read_text()) + int(pages["inactive_file"])
