from __future__ import annotations

import json
from typing import Any

import pytest

from pipekern.errors import ConfigError
from pipekern.schedule import Costs, build
from pipekern.trace import Span, Timeline
from pipekern.trace.chrome import from_chrome, to_chrome


def test_golden_event() -> None:
    data = to_chrome(Timeline.measured([Span(1, "BW", 3, 2, 1.5, 4.0), Span(0, "RECV", 0, 1, 0, 1)], 2, [1, 1], 2))
    assert data["traceEvents"][-1] == {
        "ph": "X",
        "name": "BW2",
        "cat": "compute",
        "pid": 0,
        "tid": 1,
        "ts": 1.5,
        "dur": 2.5,
        "args": {"op": "BW", "stage": 3, "microbatch": 2},
    }
    assert data["traceEvents"][-2]["cat"] == "wait"
    names = [event["args"]["name"] for event in data["traceEvents"] if event["name"] == "thread_name"]
    assert names == ["rank 0", "rank 1"]


@pytest.mark.parametrize("name", ["1f1b", "looped-bfs"])
def test_round_trip(name: str) -> None:
    timeline = build(name, ranks=3, microbatches=4).simulate(Costs(6, 4, 2, comm=1))
    assert from_chrome(json.loads(json.dumps(to_chrome(timeline)))) == timeline


def test_events_of_a_rank_do_not_overlap() -> None:
    timeline = build("interleaved-1f1b", ranks=2, microbatches=4).simulate(Costs(3, 5, 7))
    for rank in range(2):
        events = [e for e in to_chrome(timeline)["traceEvents"] if e["ph"] == "X" and e["tid"] == rank]
        ends = [0.0, *(event["ts"] + event["dur"] for event in events)]
        assert events and all(event["ts"] >= end for event, end in zip(events, ends, strict=False))


@pytest.mark.parametrize("data", [{}, {"traceEvents": []}, {"traceEvents": [{"ph": "X"}], "otherData": {}}])
def test_a_trace_of_something_else(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="was not written by pipekern"):
        from_chrome(data)
