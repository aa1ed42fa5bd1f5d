from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipekern.cli import main
from tests.cli.schedule.sample import GRID


def test_golden_simulate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--ranks", "4", "--microbatches", "8", "--json"]
    assert main(["schedule", "simulate", "interleaved-1f1b", *arguments]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["makespan"], data["busy"], data["peak_activations"]) == (28.5, [24] * 4, [5.5, 4.5, 3.5, 2.5])
    costs = ["--forward", "2,3", "--backward", "1.5", "--weight", "0", "--comm", "1", "-o", str(tmp_path / "t.json")]
    assert main(["schedule", "simulate", "gpipe", *GRID, *costs]) == 0
    assert "makespan 19 µs" in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"t.{suffix}"
    assert main(["schedule", "simulate", "zb-h2", *GRID, "--memory", "3", "--kept", "0.5", "-o", str(path)]) == 0
    assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])


def test_golden_offload(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Four micro-batches through one rank: one less at the peak, and how late a slow link makes it."""
    sizes = ["--ranks", "1", "--microbatches", "4", "--offload", "0.25", "--copy", "3"]
    assert main(["schedule", "simulate", "gpipe", *sizes]) == 0
    out = capsys.readouterr().out
    assert "peak activations a rank: 3\n" in out and "offload: rank 0: 2 away, 4 -> 3 at the peak" in out
    assert main(["schedule", "simulate", "gpipe", *sizes, "--json", "-o", str(tmp_path / "t.svg")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["offload"] == [[[0, 1, 3, 4], [0, 2, 4, 5]]] and data["stalls"][0] > 0
    assert main(["schedule", "simulate", "gpipe", *sizes[:-1], "-1"]) != 0
