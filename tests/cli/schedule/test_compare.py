from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipekern.cli import main
from pipekern.schedule import Costs, build, names, search

SIZES = ["--ranks", "4", "--microbatches", "8"]


def compared(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, float]]:
    assert main(["schedule", "compare", *SIZES, "--json", *arguments]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)["schedules"]}


def test_golden_compare(capsys: pytest.CaptureFixture[str]) -> None:
    rows = compared(capsys)
    assert set(rows) == set(names())
    assert rows["1f1b"] == {
        "name": "1f1b",
        "chunks": 1,
        "makespan": 33,
        "span": 33,
        "bubble_ratio": 9 / 33,
        "span_bubble_ratio": 9 / 33,
        "peak": 4,
        "messages": 48,
        "synchronous": True,
        "duplicates_weights": False,
        "runnable": True,
    }
    assert next(iter(rows)) == "zb-v"  # the shortest makespan comes first
    assert next(iter(compared(capsys, "--by", "span", "--memory", "8", "--chunks", "2"))) == "zb-v"


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "compare", "--ranks", "3", "--microbatches", "6", "--memory", "2.5"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == [
        "schedule",
        "chunks",
        "bubble",
        "by",
        "span",
        "makespan",
        "µs",
        "span",
        "µs",
        "peak",
        "messages",
    ]
    assert any(line.startswith("seq1f1b ") for line in out)
    refused = out[out.index("not built:") + 1 :]
    assert "  ranks=3: dualpipe needs a multiple of 2; nearest ranks=4" in refused
    assert any(line.startswith("  memory=2.5: 1f1b holds 3 activations") for line in refused)


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "compare", *SIZES, "--memory", "0.25"]) == 1
    assert "not built:" in capsys.readouterr().out


def test_bad_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "compare", *SIZES, "--forward", "-1"]) == 2
    assert "forward=-1.0 is not a finite number of at least 0" in capsys.readouterr().err


def test_search_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pipekern._C")
    arguments = ["--ranks", "3", "--microbatches", "4", "--comm", "0.5", "--search"]
    assert main(["schedule", "compare", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["search"]
    assert [row["memory"] for row in found] == [1, 2, 3, 4]
    for row in found:
        best = search(3, 4, Costs(1, 1, 1, comm=0.5), memory=row["memory"], objective="makespan")
        assert row["makespan"] == best.simulate(Costs(1, 1, 1, comm=0.5)).makespan
        assert row["peak"] <= row["memory"]
    assert main(["schedule", "compare", *arguments, "--memory", "2"]) == 0
    out = capsys.readouterr().out
    assert "search, memory 2" in out and "search, memory 3" not in out


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    path = tmp_path / "all.svg"
    assert main(["schedule", "compare", *SIZES, "--plot", str(path), "--by", "span"]) == 0
    words = "".join(ElementTree.fromstring(path.read_text()).itertext())
    assert all(name in words for name in names()) and "bubble of the span, %" in words


def test_own_costs_a_stage_leave_out_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    rows = compared(capsys, "--forward", "1,2,3,4")
    assert {"1f1b", "zb-h2"} <= set(rows) and "zb-v" not in rows
    schedule = build("1f1b", ranks=4, microbatches=8)
    assert rows["1f1b"]["makespan"] == schedule.simulate(Costs([1, 2, 3, 4], 1, 1)).makespan


def test_notes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "compare", *SIZES]) == 0
    notes = {line.split()[0]: line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert notes["dualpipe"] == "weights twice, simulated only"
    assert notes["pipedream-2bw"] == "asynchronous, weights twice, simulated only"
    assert notes["1f1b"] == "48"  # messages, and nothing to note
