from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pipekern.cli import main
from pipekern.schedule import build, torch_csv
from tests.cli.schedule.sample import GRID


def test_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(str(build("gpipe", ranks=1, microbatches=1))))
    assert main(["schedule", "check", "-"]) == 0


def test_torch_csv(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(torch_csv.dumps(build("zb-v", ranks=2, microbatches=3)))
    assert main(["schedule", "check", str(path)]) == 0
    assert capsys.readouterr().out.startswith("mine: no fault; 2 ranks, 3 micro-batches")


def test_a_file_that_is_no_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    assert main(["schedule", "check", str(tmp_path / "x.txt")]) == 2
    assert "x.txt cannot be read" in capsys.readouterr().err


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
