from __future__ import annotations

from pathlib import Path

import pytest

from pipekern.cli import main
from pipekern.schedule import Schedule, explore


def test_golden_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "explore.html"
    assert main(["schedule", "explore", "-o", str(path)]) == 0
    assert path.read_text(encoding="utf-8") == explore.page()
    assert capsys.readouterr().out == f"{path}: open it in a browser\n"


def test_own_schedules(tmp_path: Path) -> None:
    mine, path = tmp_path / "mine.txt", tmp_path / "explore.html"
    assert main(["schedule", "show", "chimera", "--ranks", "2", "--microbatches", "4", "-o", str(mine)]) == 0
    assert main(["schedule", "explore", str(mine), "-o", str(path)]) == 0
    assert path.read_text(encoding="utf-8") == explore.page([Schedule.parse(mine.read_text())])


def test_faults(capsys: pytest.CaptureFixture[str], tmp_path: Path, bad: str) -> None:
    path = tmp_path / "explore.html"
    assert main(["schedule", "explore", bad, "-o", str(path)]) == 1
    assert "rank 0 stuck at 0BW0" in capsys.readouterr().err
    assert main(["schedule", "explore", str(tmp_path / "no.txt"), "-o", str(path)]) == 2
    assert "no.txt cannot be read" in capsys.readouterr().err
    assert not path.exists()
