from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import pipekern
from pipekern.cli import doctor, main

KEYS = {"pipekern", "python", "cores", "torch", "gpus", "extension", "kernel", "transport", "faults", "packages"}
KEYS |= {"tier", "cuda", "links", "why"}


def test_golden_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) > KEYS
    assert report["pipekern"] == pipekern.__version__ and report["cores"] >= 1 and report["faults"] == []
    assert main(["doctor"]) == 0
    assert f"pipekern     {pipekern.__version__}" in capsys.readouterr().out


def test_without_torch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] is None and report["gpus"] == []
    assert report["faults"][0].startswith("torch does not load")


def test_built_as_pure_python(monkeypatch: pytest.MonkeyPatch) -> None:
    note = {"tier": "python", "compiler": "", "reason": "no C++ compiler: install g++"}
    monkeypatch.setitem(sys.modules, "pipekern._C", None)
    monkeypatch.setattr(doctor, "_build_note", lambda: note)
    report = doctor.examine()
    assert report["extension"] == note["reason"] and report["transport"].startswith("dist")
    assert not any("_C" in fault for fault in report["faults"])


def test_built_but_not_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipekern._C", None)
    monkeypatch.setattr(doctor, "_build_note", lambda: {"tier": "cpu", "compiler": "GNU", "reason": ""})
    assert any("pipekern._C was built but does not load" in fault for fault in doctor.examine()["faults"])


def test_note_of_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "cli" / "doctor.py"))
    assert doctor._build_note()["reason"].startswith("not built")
    (tmp_path / "_build.json").write_text('{"tier": "cpu", "compiler": "GNU 12", "reason": ""}')
    assert doctor._build_note()["compiler"] == "GNU 12"
