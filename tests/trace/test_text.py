from __future__ import annotations

from pipekern.schedule import Costs, build
from pipekern.trace import Span, Timeline, text


def test_golden_drawing() -> None:
    timeline = build("1f1b", ranks=2, microbatches=3).simulate(Costs(1, 1, 1))
    assert text.draw(timeline, 24).splitlines() == [
        "rank 0 F0F1....B0bbF2B1bb..B2bb",
        "rank 1 ..F0B0bbF1B1bbF2B2bb....",
    ]


def test_waits_and_stages() -> None:
    spans = [Span(0, "RECV", 0, 0, 0, 4), Span(0, "F", 0, 10, 4, 10), Span(0, "SEND", 0, 10, 10, 12)]
    timeline = Timeline.measured([*spans, Span(0, "W", 2, 7, 14, 20)], 1, [1], 0)
    assert text.draw(timeline, 20) == "rank 0 <<<<F10/0f>>..W7/2ww"


def test_rows_line_up_at_any_size() -> None:
    for ranks, microbatches, width in ((1, 1, 5), (3, 7, 80), (12, 24, 100), (12, 24, 7)):
        timeline = build("looped-bfs", ranks=ranks, microbatches=microbatches).simulate(Costs(0.1, 0.7, 0.01))
        rows = text.draw(timeline, width).splitlines()
        assert len(rows) == ranks
        assert {len(row) for row in rows} == {len(f"rank {ranks - 1} ") + width}


def test_nothing_to_draw() -> None:
    assert text.draw(Timeline.measured([], 2, [0, 0], 0), 4) == "rank 0 ....\nrank 1 ...."
