from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipekern.cli import main
from pipekern.schedule import Costs, build
from pipekern.trace import Span, Timeline
from pipekern.trace.chrome import to_chrome


def measured() -> Timeline:
    timeline = build("1f1b", ranks=2, microbatches=3).simulate(Costs(2, 2, 2))
    spans = [*timeline.spans, Span(1, "RECV", 1, 0, 0, 2)]
    return Timeline.measured(spans, 2, timeline.peak_activations, timeline.messages)


def test_golden_run_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(json.dumps(to_chrome(measured())))
    assert main(["trace", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (
        "makespan 24 µs" in out and "bubble 0.2500 of the makespan" in out and "waits for messages a rank: 0 2" in out
    )
    assert main(["trace", str(tmp_path), "--json"]) == 0
    assert Timeline.from_dict(json.loads(capsys.readouterr().out)) == measured()


def test_a_timeline_becomes_a_chrome_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "timeline.json").write_text(json.dumps(measured().to_dict()))
    assert main(["trace", str(tmp_path / "timeline.json"), "-o", str(tmp_path / "chrome.json")]) == 0
    assert json.loads((tmp_path / "chrome.json").read_text()) == to_chrome(measured())


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "trace.json").write_text(json.dumps(to_chrome(measured())))
    assert main(["trace", str(tmp_path), "-o", str(tmp_path / "t.svg")]) == 0
    assert "<svg" in (tmp_path / "t.svg").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("{", "is no JSON"), ("{}", "has neither"), ("[]", "has neither")],
)
def test_wrong_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "trace.json").write_text(content)
    assert main(["trace", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
