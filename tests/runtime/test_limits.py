"""The memory that a rank may take."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pipekern.runtime import limits

GIB = 2**30


def test_golden() -> None:
    """Ranks 0 and 1 share a device of 8 GiB free, rank 2 is on another host; each has 1 GiB of weights there."""
    rows = [{"device": "cpu", "free": free * GIB, "resident": GIB} for free in (8, 8, 6)]
    assert limits.limits(rows, lambda a, b: (a < 2) == (b < 2)) == [5 * GIB, 5 * GIB, 7 * GIB]


def test_devices_of_one_host_are_apart() -> None:
    rows = [{"device": f"cuda:{i}", "free": 4, "resident": i} for i in range(3)]
    assert limits.limits(rows, lambda a, b: True) == [4, 5, 6]


def test_one_that_is_not_known() -> None:
    assert limits.limits([{"device": "cpu", "free": 1, "resident": 0}, {}], lambda a, b: True) is None


def test_this_machine() -> None:
    net = nn.Linear(100, 100, bias=False)
    row = limits.memory_of(net, torch.device("cpu"), sharers=2)
    assert row["device"] == "cpu" and row["resident"] == 20_000
    assert limits.memory_of([], torch.device("cpu"))["resident"] == 0
    assert limits.memory_of(net.to("meta"), torch.device("cpu"))["resident"] == 0


def test_free_memory_of_a_host(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   40 kB\n")
    assert limits._free_of_host(tmp_path / "meminfo") == 40 * 1024
    assert limits._free_of_host(tmp_path / "nothing") is None


def test_free_memory_of_a_container(tmp_path: Path) -> None:
    """1000 at most, 700 in use, of which 200 are file pages."""
    assert limits._free_of_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert limits._free_of_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\n")
    assert limits._free_of_group(tmp_path) == 500
