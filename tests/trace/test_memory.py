from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import pytest

from pipekern.errors import ConfigError
from pipekern.schedule import Costs, Schedule, build, names
from pipekern.trace import Timeline, memory
from tests.schedule.sample import random_schedule


def shares(schedule: Schedule) -> list[Fraction]:
    return [Fraction(1, schedule.share(stage) * schedule.slices) for stage in range(schedule.stages)]


def test_golden_curve() -> None:
    schedule = Schedule.parse("pipekern-schedule name=x microbatches=2 stage_rank=0\n0F0 0F1 0B0 0W0 0BW1\n")
    timeline = schedule.simulate(Costs(2, 3, 1))
    assert memory.curves(timeline, [1.0], kept=0.25) == [[(0, 1), (2, 2), (7, 1.25), (8, 1), (12, 0)]]


@pytest.mark.parametrize("name", names())
def test_highest_point_is_the_peak(name: str) -> None:
    random = Random()
    kept = random.choice([0, 0.25, 0.6, 1])
    schedule = build(name, ranks=4, microbatches=8)
    timeline = schedule.simulate(Costs(random.randint(1, 9), random.randint(0, 9), random.randint(0, 9), kept=kept))
    held = memory.curves(timeline, shares(schedule), kept)
    assert [max(value for _, value in curve) for curve in held] == timeline.peak_activations
    for curve in held:
        assert [time for time, _ in curve] == sorted(time for time, _ in curve)
        assert curve[-1][1] == 0


def test_random_orders() -> None:
    random = Random()
    for _ in range(50):
        schedule = random_schedule(random)
        timeline = schedule.simulate(Costs(1, 2, 1, kept=0.5))
        held = memory.curves(timeline, shares(schedule), 0.5)
        assert [max((value for _, value in curve), default=0) for curve in held] == timeline.peak_activations


def drawn(path: Path, limit: float | None) -> str:
    schedule = build("dualpipe", ranks=4, microbatches=8)
    timeline = schedule.simulate(Costs(1, 1, 1))
    memory.draw(timeline, memory.curves(timeline, shares(schedule)), path, "a title", limit)
    return "" if path.suffix == ".png" else "\n".join(ElementTree.fromstring(path.read_text()).itertext())


def test_picture_names_ranks_peaks_and_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    words = drawn(tmp_path / "memory.svg", 4.5)
    assert "a title   bubble" in words and "in activations of one micro-batch; limit 4.5" in words
    assert words.count("peak 5") == 4 and words.count("rank 3") == 2
    dashes = "stroke: #d55e00"
    assert (tmp_path / "memory.svg").read_text().count(dashes) == 4  # a line a rank
    assert "limit" not in drawn(tmp_path / "free.svg", None)
    assert dashes not in (tmp_path / "free.svg").read_text()


def test_the_same_svg_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / name for name in ("one.svg", "two.svg")]
    for path in paths:
        drawn(path, 3)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_png_of_many_ranks_and_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    schedule = build("v-half", ranks=16, microbatches=32)
    timeline = schedule.simulate(Costs(3000, 3000, 1000))
    memory.draw(timeline, memory.curves(timeline, shares(schedule)), tmp_path / "many.png")
    data = (tmp_path / "many.png").read_bytes()
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert width >= 1200 and height >= 2 * 16 * 28
    memory.draw(Timeline.measured([], 2, [0, 0], 0), [[], []], tmp_path / "nothing.png")


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'x.gif' is no picture"):
        drawn(tmp_path / "x.gif", None)
