from __future__ import annotations

import json

import pytest

from pipekern.cli import main
from tests.cli.schedule.sample import GRID


def test_golden_check(capsys: pytest.CaptureFixture[str], bad: str) -> None:
    assert main(["schedule", "check", "gpipe", *GRID, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "faults": [], "slots": {"0->1": 4, "1->0": 2}}
    assert main(["schedule", "check", bad, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert not data["ok"] and data["faults"][0].startswith("rank 0 stuck at 0BW0")
    assert main(["schedule", "check", bad]) == 1
    assert capsys.readouterr().err.startswith("error: schedule deadlocks")
