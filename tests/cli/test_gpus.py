from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipekern.cli import gpus
from pipekern.errors import TransportError
from pipekern.transport import probe


def extension(obstacle: str) -> SimpleNamespace:
    """A machine with two GPUs that do not reach each other one way; the second has no stream memory operations."""
    return SimpleNamespace(
        cuda_obstacle=lambda: obstacle,
        cuda_kernels=lambda: "embedded",
        cuda_driver=lambda: {"version": "13.0", "devices": [("H200", True), ("old", False)]},
        peer_obstacle=lambda a, b: "no peer access" if (a, b) == (0, 1) else "",
    )


def test_golden_report() -> None:
    assert gpus.examine(extension("")) == {
        "driver": "13.0",
        "kernels": "embedded",
        "devices": ["H200", "old"],
        "waits": ["on the device", "on the host"],
        "peers": [["yes", "no peer access"], ["yes", "yes"]],
    }


def test_without() -> None:
    assert gpus.examine(None) == {"driver": None, "why": "the C++ extension is not built"}
    assert gpus.examine(extension("no driver"))["why"] == "no driver"


def test_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "run", lambda count: [probe.Measured("0>1", "ipc", 12.34, 2e12)])
    assert gpus.self_test(1) == (["0>1 ipc, 12.3 µs, 2000.0 GB/s"], "")

    def fails(count: int) -> None:
        raise TransportError("the links' self-test failed: here is why")

    monkeypatch.setattr(probe, "run", fails)
    assert gpus.self_test(2) == ([], "the links' self-test failed: here is why")
