from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pipekern.cli import main
from pipekern.schedule import Schedule, build

GRID = ["--ranks", "2", "--microbatches", "3"]
BAD = "pipekern-schedule name=bad microbatches=1 stage_rank=0,1\n0BW0 0F0\n1F0 1BW0\n"


@pytest.fixture
def bad(tmp_path: Path) -> str:
    path = tmp_path / "bad.txt"
    path.write_text(BAD)
    return str(path)


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


def test_check(capsys: pytest.CaptureFixture[str], bad: str) -> None:
    assert main(["schedule", "check", "gpipe", *GRID, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "faults": [], "slots": {"0->1": 4, "1->0": 2}}
    assert main(["schedule", "check", bad, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert not data["ok"] and data["faults"][0].startswith("rank 0 stuck at 0BW0")
    assert main(["schedule", "check", bad]) == 1
    assert capsys.readouterr().err.startswith("error: schedule deadlocks")


def test_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(str(build("gpipe", ranks=1, microbatches=1))))
    assert main(["schedule", "check", "-"]) == 0


def test_simulate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--ranks", "4", "--microbatches", "8", "--json"]
    assert main(["schedule", "simulate", "interleaved-1f1b", *arguments]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["makespan"], data["busy"], data["peak_activations"]) == (28.5, [24] * 4, [5.5, 4.5, 3.5, 2.5])
    costs = ["--forward", "2,3", "--backward", "1.5", "--weight", "0", "--comm", "1", "-o", str(tmp_path / "t.json")]
    assert main(["schedule", "simulate", "gpipe", *GRID, *costs]) == 0
    assert "makespan 19 µs" in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "1f1"], "nearest: 1f1b"),
        (["check", "nowhere.txt"], "nowhere.txt does not exist"),
        (["check", "1f1b"], "1f1b needs --ranks and --microbatches"),
        (["check", "1f1b", *GRID, "--chunks", "3"], "nearest chunks=1"),
        (["simulate", "gpipe", *GRID, "--forward", "1,2,3"], "forward has 3 values"),
        (["simulate", "gpipe", *GRID, "-o", "x.gif"], "'x.gif' ends in neither"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["schedule", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert main(["schedule", *arguments, "--json"]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]


def test_a_file_says_its_own_sizes(capsys: pytest.CaptureFixture[str], bad: str) -> None:
    assert main(["schedule", "check", bad, "--ranks", "2"]) == 2
    assert "a file says its own sizes" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["schedule"], ["schedule", "simulate", "1f1b", "--forward", "x"]])
def test_what_argparse_refuses(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
