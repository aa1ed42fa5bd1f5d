from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipekern.cli import main
from pipekern.schedule import Schedule, build, torch_csv
from tests.cli.schedule.sample import BAD, GRID


def test_golden_show_is_a_file_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["schedule", "show", "1f1b", *GRID]) == 0
    out = capsys.readouterr().out
    assert "# rank 0 F0F1....B0bbF2B1bb..B2bb\n# rank 1 ..F0B0bbF1B1bbF2B2bb....\n" in out
    assert Schedule.parse(out) == build("1f1b", ranks=2, microbatches=3)
    (tmp_path / "mine.txt").write_text(out)
    assert main(["schedule", "show", str(tmp_path / "mine.txt")]) == 0
    assert capsys.readouterr().out == out


def test_show_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "show", "looped-bfs", *GRID, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["name"], data["chunks"], data["stage_rank"]) == ("looped-bfs", 2, [0, 1, 0, 1])
    assert (data["runnable"], data["synchronous"], data["duplicates_weights"]) == (True, True, False)
    assert data["actions"][0][:4] == ["0F0", "0F1", "0F2", "2F0"]


def test_show_draws_what_runs_before_a_deadlock(capsys: pytest.CaptureFixture[str], bad: str) -> None:
    assert main(["schedule", "show", bad]) == 1
    assert "# rank 0 stuck at 0BW0 (instruction 0): waits for 0F0" in capsys.readouterr().out


def test_show_lists_faults_that_no_picture_can_show(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(BAD.replace("1F0", "7F0"))
    assert main(["schedule", "show", str(tmp_path / "x.txt")]) == 1
    assert "rank 1 runs 7F0, but there are 2 stages" in capsys.readouterr().out


def test_plot_and_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot, text, csv = (tmp_path / name for name in ("show.svg", "show.txt", "show.csv"))
    assert main(["schedule", "show", "zb-v", *GRID, "--plot", str(plot), "-o", str(text)]) == 0
    schedule = build("zb-v", ranks=2, microbatches=3)
    assert text.read_text() == str(schedule)
    root = ElementTree.fromstring(plot.read_text())
    assert root.tag.endswith("svg")
    assert main(["schedule", "show", str(text), "-o", str(csv)]) == 0
    assert torch_csv.loads(csv.read_text()).actions == schedule.actions


def test_plot_of_what_runs_before_a_deadlock(bad: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["schedule", "show", bad, "--plot", str(tmp_path / "bad.png")]) == 1
    assert (tmp_path / "bad.png").read_bytes().startswith(b"\x89PNG")
