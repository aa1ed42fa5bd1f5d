from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipekern.errors import ConfigError
from pipekern.schedule import Costs, Schedule, build
from pipekern.trace import Span, Timeline, gantt


def everything() -> Timeline:
    """Two ranks that do each kind of thing."""
    text = "pipekern-schedule name=w microbatches=2 stage_rank=0,1\n0F0 0F1 0B0 0W0 0BW1\n1F0 1BW0 1F1 1BW1\n"
    timeline = Schedule.parse(text).simulate(Costs(3, 3, 3))
    waits = [Span(1, "RECV", 1, 0, 0, 3), Span(0, "SEND", 0, 1, 6, 7)]
    return Timeline.measured([*waits, *timeline.spans], 2, timeline.peak_activations, timeline.messages)


def test_golden_svg_names_every_kind_and_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    gantt.draw(everything(), tmp_path / "timeline.svg", "a title")
    root = ElementTree.fromstring((tmp_path / "timeline.svg").read_text())
    words = {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}
    kinds = {"F forward", "B input gradient", "W weight gradient", "BW whole backward", "wait to receive"}
    assert words >= kinds | {"wait to send", "idle", "rank 0", "rank 1", "F0", "B1", "W0", "µs"}
    assert any(word.startswith("a title") for word in words)


@pytest.mark.parametrize("ranks", [2, 16])
def test_png(tmp_path: Path, ranks: int) -> None:
    pytest.importorskip("matplotlib")
    timeline = build("interleaved-1f1b", ranks=ranks, microbatches=ranks).simulate(Costs(2000, 2000, 1000))
    gantt.draw(timeline, tmp_path / "timeline.png")
    data = (tmp_path / "timeline.png").read_bytes()
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert data.startswith(b"\x89PNG") and width >= 1200 and height >= 42 * ranks


def test_empty_timeline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    gantt.draw(Timeline.measured([], 1, [0], 0), tmp_path / "empty.png")


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'timeline.gif' is no picture; .*\.png"):
        gantt.draw(everything(), tmp_path / "timeline.gif")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'pipekern\[plot\]'"):
        gantt.draw(everything(), tmp_path / "timeline.png")
