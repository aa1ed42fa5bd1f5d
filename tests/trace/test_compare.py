from __future__ import annotations

from itertools import combinations
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import pytest

from pipekern.errors import ConfigError
from pipekern.trace.compare import Point, draw

POINTS = [
    Point("one", 4, 0.25),
    Point("same place", 4, 0.25, runnable=False, duplicates_weights=True),
    Point("other", 2, 0.1, runnable=False),
]


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")


def words(path: Path) -> list[str]:
    space = "{http://www.w3.org/2000/svg}"
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(path.read_text()).iter(f"{space}text")]


@pytest.mark.usefixtures("text")
def test_golden_names_and_kinds(tmp_path: Path) -> None:
    draw(POINTS, tmp_path / "all.svg", "a title", found=[(2, 0.1), (1, 0.3)], limit=3, axis="bubble of the span")
    found = words(tmp_path / "all.svg")
    assert {"one, same place", "other", "a title", "bubble of the span, %", "limit 3", "best that search finds"} <= set(
        found
    )
    kinds = {"can train today", "simulated only", "simulated only, weights kept twice"}
    assert kinds <= set(found) and "can train today, weights kept twice" not in found


@pytest.mark.usefixtures("text")
def test_names_do_not_cover_each_other(tmp_path: Path) -> None:
    """Ten dots close together: no two names at one place."""
    random = Random()
    points = [Point(f"schedule {index}", 4 + random.random(), 0.2 + random.random() / 10) for index in range(10)]
    draw(points, tmp_path / "dense.svg")
    space = "{http://www.w3.org/2000/svg}"
    places = [
        (float(node.attrib["x"]), float(node.attrib["y"]))
        for node in ElementTree.fromstring((tmp_path / "dense.svg").read_text()).iter(f"{space}text")
        if "schedule" in "".join(node.itertext())
    ]
    assert len(places) == 10
    for one, other in combinations(places, 2):
        assert abs(one[0] - other[0]) > 5 or abs(one[1] - other[1]) > 5


def test_png_of_one_and_of_none(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for points in (POINTS[:1], [], [Point("idle never", 1, 0)]):
        draw(points, tmp_path / "few.png", found=[(1, 0.0)])
        assert (tmp_path / "few.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'all.jpg' is no picture; .*\.png"):
        draw(POINTS, tmp_path / "all.jpg")
