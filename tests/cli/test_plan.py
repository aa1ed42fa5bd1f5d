from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipekern.cli import main

TRANSFORMER = ["--transformer", "layers=4,dim=256,heads=4,vocab=1000,sequence=128"]
DEVICES = "count=2,flops=1e12,memory=1e9,latency=5,link=1e10"


def test_golden_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TRANSFORMER, "--devices", DEVICES, "--samples", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "micro-batches of" in lines[0] and lines[1].startswith("step ") and "bubble" in lines[1]
    assert lines[3].split()[:4] == ["rank", "device", "layers", "weights"] and len(lines) == 6


def test_json_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, cluster = tmp_path / "model.json", tmp_path / "cluster.json"
    model.write_text(json.dumps({"names": ["a", "b"], "forward": [1, 1], "backward": [1, 1], "weight": [1, 1]}))
    cluster.write_text(json.dumps({"devices": [{"flops": 1, "count": 2}]}))
    arguments = ["--samples", "4", "--microbatches", "2,4", "--schedules", "1f1b,gpipe", "--json"]
    assert main(["plan", "--model", str(model), "--cluster", str(cluster), *arguments]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["schedule"], data["microbatches"], data["split"], data["step_us"]) == ("1f1b", 4, [1, 1], 15)


def test_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    small = DEVICES.replace("1e9", "1e6")
    assert main(["plan", *TRANSFORMER, "--devices", small, "--samples", "8", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert "the plan does not fit" in error and "would fit: the same plan on devices with" in error


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(tmp_path / "no.json"), "--devices", DEVICES, "--samples", "8"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["plan", *TRANSFORMER, "--devices", "count=0,flops=1", "--samples", "8"]) == 2
    assert "needs at least one device" in capsys.readouterr().err
