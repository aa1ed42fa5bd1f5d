from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from pipekern.schedule import Costs, build
from pipekern.trace import Span, Timeline


def test_golden_measured() -> None:
    spans = [
        Span(1, "RECV", 1, 0, 0.0, 10.0),
        Span(0, "F", 0, 0, 1.0, 9.0),
        Span(1, "F", 1, 0, 10.0, 20.0),
        Span(1, "BW", 1, 0, 20.0, 40.0),
        Span(0, "RECV", 0, 0, 9.0, 41.0),
        Span(0, "BW", 0, 0, 41.0, 57.0),
    ]
    timeline = Timeline.measured(spans, 2, [1, 1], 2)
    assert [span.op for span in timeline.of_rank(0)] == ["F", "RECV", "BW"]
    assert [span.op for span in timeline.of_rank(1)] == ["RECV", "F", "BW"]
    assert (timeline.ranks, timeline.makespan, timeline.span, timeline.busy) == (2, 57.0, 56.0, [24.0, 30.0])
    assert timeline.bubble_ratio == (2 * 57 - 54) / (2 * 57)
    assert timeline.span_bubble_ratio == (2 * 56 - 54) / (2 * 56)


def test_nothing_measured() -> None:
    empty = Timeline.measured([], 2, [0, 0], 0)
    assert (empty.makespan, empty.span, empty.busy, empty.bubble_ratio, empty.span_bubble_ratio) == (0, 0, [0, 0], 0, 0)


def test_simulated_and_measured_agree() -> None:
    simulated = build("1f1b", ranks=3, microbatches=5).simulate(Costs(3, 2, 1, comm=1))
    again = Timeline.measured(simulated.spans[::-1], 3, simulated.peak_activations, simulated.messages)
    assert (again.makespan, again.span, again.busy) == (simulated.makespan, simulated.span, simulated.busy)


@given(st.integers(1, 4), st.integers(1, 5), st.floats(0, 1e6), st.integers(0, 1000))
def test_json_round_trip(ranks: int, microbatches: int, forward: float, weight: int) -> None:
    timeline = build("1f1b", ranks=ranks, microbatches=microbatches).simulate(Costs(forward, 1 / 3, weight))
    assert Timeline.from_dict(json.loads(json.dumps(timeline.to_dict()))) == timeline
