"""Chrome's trace event format, which Perfetto and chrome://tracing open: one row a rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipekern.errors import ConfigError
from pipekern.trace.timeline import COLLECTIVES, WAITS, Span, Timeline

_FIGURES = ("makespan", "span", "busy", "peak_activations", "messages")


def to_chrome(timeline: Timeline) -> dict[str, Any]:
    """``timeline`` as a JSON object of trace events; :func:`from_chrome` reads it back.

    A span is named ``F3`` after its operation and micro-batch, its category is ``compute`` or ``wait``; times are in
    microseconds.
    """
    names: list[dict[str, Any]] = [_meta("process_name", 0, name="pipekern")]
    for rank in range(timeline.ranks):
        names += [_meta("thread_name", rank, name=f"rank {rank}"), _meta("thread_sort_index", rank, sort_index=rank)]
    return {
        "traceEvents": [*names, *map(_event, timeline.spans)],
        "displayTimeUnit": "ms",
        "otherData": {name: getattr(timeline, name) for name in _FIGURES},
    }


def _meta(kind: str, rank: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": 0, "tid": rank, "args": args}


def _event(span: Span) -> dict[str, Any]:
    beside = span.op in COLLECTIVES  # another process of the picture, for they overlap the rank's work
    return {
        "ph": "X",
        "name": f"{span.op}{span.microbatch}",
        "cat": "wait" if span.op in WAITS else "collective" if beside else "compute",
        "pid": int(beside),
        "tid": span.rank,
        "ts": span.start,
        "dur": span.end - span.start,
        "args": {"op": span.op, "stage": span.stage, "microbatch": span.microbatch},
    }


def from_chrome(data: Mapping[str, Any]) -> Timeline:
    """The timeline that :func:`to_chrome` wrote; ends may differ from the original in the last binary digit.

    Raises ``ConfigError`` for a trace that something else wrote.
    """
    try:
        figures = {name: data["otherData"][name] for name in _FIGURES}
        spans = tuple(
            Span(event["tid"], **event["args"], start=event["ts"], end=event["ts"] + event["dur"])
            for event in data["traceEvents"]
            if event["ph"] == "X"
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"a trace without {error} was not written by pipekern; give its trace.json") from error
    return Timeline(spans=spans, **figures)
