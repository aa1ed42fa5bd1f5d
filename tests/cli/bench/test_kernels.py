"""``pipekern bench kernels``: its rows, what it says without a GPU, and its exit codes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipekern.cli import main
from pipekern.cli.bench import accuracy, cases, clock, roofline, speed
from pipekern.cli.bench.case import SMALL, Case
from pipekern.cli.bench.kernels import OPS
from pipekern.cli.bench.machine import Rates
from pipekern.cli.bench.row import Row
from pipekern.kernels.rms_norm import rms_norm

RATES = Rates(copy=4e12, product=7e14, least=2.0)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a CUDA device")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")


@no_gpu
def test_golden(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "swiglu"]) == 0
    out = capsys.readouterr().out
    assert "gpu: none: times are not measured" in out and "gpu_us" not in out
    rows = [line.split() for line in out.splitlines() if line.startswith("swiglu")]
    assert len(rows) == 2 * 3 * 2  # two cases, three dtypes, ours and torch's
    assert {row[-1] for row in rows} == {"True"}


@no_gpu
def test_every_op(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is as close to float64 as it must be in each dtype; JSON and CSV hold the same rows."""
    file = tmp_path / "new" / "kernels.csv"
    assert main(["bench", "kernels", "--json", "--csv", str(file)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and {row["op"] for row in report["rows"]} == set(OPS)
    ours = [row for row in report["rows"] if row["contender"] == "pipekern"]
    assert {row["dtype"] for row in ours} == {"float32", "bfloat16", "float16"}
    assert all(row["gpu_us"] is None and row["error"] < 0.03 for row in ours)
    lines = file.read_text().splitlines()
    assert any(line.startswith("# torch: 2") for line in lines)
    written = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [row["op"] for row in written] == [row["op"] for row in report["rows"]]
    assert tuple(written[0]) == Row._fields


@no_gpu
def test_an_op_that_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A gradient that is off by one part in a hundred is found, and the exit code says so."""
    right: Any = rms_norm
    monkeypatch.setattr(cases, "rms_norm", lambda x, *rest: right(x + 0.01 * (x - x.detach()), *rest))
    assert main(["bench", "kernels", "rms_norm"]) == 1
    assert "too far from float64: rms_norm 96×256 float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [(["rms"], "no kernel is called rms"), (["--plot", "a.txt"], "a.txt"), (["--plot", "a.png"], "no CUDA device")],
)
@no_gpu
def test_wrong_usage(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *words]) == 2
    assert why in capsys.readouterr().err


def test_the_names_are_those_of_the_cases() -> None:
    assert set(OPS) == set(cases._OPS)


def fake(run: Callable[[Any], Any], before: Callable[[], Any] = lambda: None) -> clock.Timing:
    """Runs it once."""
    run(before())
    return clock.Timing(gpu_us=50.0, host_us=10.0, launches=1, peak_bytes=0)


def test_rows_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a clock that stands: every direction and mode has a row, shares are of the rates, a picture is drawn."""
    small = cases.cases
    monkeypatch.setattr(speed, "cases", lambda name, sizes, dtype, device: small(name, SMALL, dtype, "cpu"))
    monkeypatch.setattr(speed, "clocked", fake)
    monkeypatch.setattr(speed, "captured", lambda run: lambda _: run())
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    names = ["swiglu", "linear_cross_entropy", "adamw_step"]
    rows = speed.measure(names, accuracy.judge(names, "cpu"), RATES)
    ours = [row for row in rows if row.contender == "pipekern" and row.shape == "96×256"]
    assert [(row.mode, row.direction) for row in ours] == [
        ("eager", "forward"),
        ("eager", "backward"),
        ("compiled", "forward"),
        ("compiled", "backward"),
        ("graph", "both"),
    ]
    n = 96 * 256 * 2
    assert [row.bytes_floor for row in ours] == [3 * n, 5 * n, 3 * n, 5 * n, 8 * n]
    assert ours[0].pct_of_copy == pytest.approx(100 * 3 * n / 50e-6 / 4e12)
    products = [row for row in rows if row.op == "linear_cross_entropy"]
    assert {row.direction for row in products} == {"both"} and all(row.pct_of_copy is None for row in products)
    assert products[0].pct_of_product == pytest.approx(100 * 6 * 96 * 256 * 1000 / 50e-6 / 7e14)
    assert not any(row.note for row in rows)
    roofline.draw(rows, RATES, tmp_path / "a.svg", "a GPU")
    assert "pipekern" in (tmp_path / "a.svg").read_text()


def test_a_contender_that_fails_has_a_note() -> None:
    """Another library's error is written down; ours is raised."""

    def broken(*inputs: Any) -> Callable[[], Any]:
        raise RuntimeError("not here\nat all")

    case = Case("op", "1", [torch.ones(1)], {"torch": lambda x: lambda: x, "other": broken, "pipekern": broken}, 4)
    assert accuracy._row(case, "float32", "other").note == "RuntimeError: not here"
    with pytest.raises(RuntimeError, match="not here"):
        accuracy._row(case, "float32", "pipekern")


def test_error() -> None:
    one = torch.tensor([1.0, 2.0])
    assert accuracy.error(one, one.double()) == 0
    assert accuracy.error(one, torch.tensor([1.0, 4.0]).double()) == 0.5
    assert accuracy.error(one * torch.nan, one.double()) == float("inf")
    assert accuracy.error(one[:1], one.double()) == float("inf")


@gpu
@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every op runs in every mode at a small shape, with one launch or more, in a time."""
    monkeypatch.setattr(speed, "LARGE", SMALL)
    assert main(["bench", "kernels", "--json", "--plot", str(tmp_path / "a.png")]) == 0
    ours = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["contender"] == "pipekern"]
    assert {row["mode"] for row in ours} == {"eager", "compiled", "graph"}
    assert all(row["gpu_us"] > 0 and row["launches"] >= 1 for row in ours)
