"""What commands print and write."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipekern.errors import ConfigError
from pipekern.plan.offload import Offload
from pipekern.schedule import torch_csv
from pipekern.schedule.ir import Schedule
from pipekern.schedule.simulate import Costs
from pipekern.trace import chrome, gantt, memory, text
from pipekern.trace.figure import FORMATS
from pipekern.trace.timeline import WAITS, Timeline


def emit(as_json: bool, data: dict[str, Any], lines: str) -> None:
    """``data`` as JSON, or ``lines`` for a reader: errors to stderr, the rest to stdout."""
    if as_json:
        print(json.dumps(data, indent=1))
    else:
        print(lines, file=sys.stderr if lines.startswith("error: ") else sys.stdout)


def write(timeline: Timeline, path: Path, title: str) -> None:
    """A picture, or a Chrome trace where ``path`` ends in .json; raises ``ConfigError`` for other suffixes."""
    if path.suffix == ".json":
        path.write_text(json.dumps(chrome.to_chrome(timeline)))
    elif path.suffix in FORMATS:
        gantt.draw(timeline, path, title)
    else:
        raise ConfigError(f"{path.name!r} ends in neither {', '.join(FORMATS)} (picture) nor .json (Chrome trace)")


def write_picture(offload: Offload, costs: Costs, path: Path, limit: float | None = None) -> None:
    """The simulated timeline and below it what every rank holds, with the ``limit`` as a line."""
    schedule, timeline = offload.schedule, offload.simulate(costs)
    shares = [Fraction(1, schedule.share(stage) * schedule.slices) for stage in range(schedule.stages)]
    memory.draw(timeline, memory.curves(timeline, shares, costs.kept), path, title(schedule), limit)


def write_schedule(schedule: Schedule, path: Path) -> None:
    """The text form, or torch.distributed.pipelining's CSV where ``path`` ends in .csv."""
    path.write_text(torch_csv.dumps(schedule) if path.suffix == ".csv" else str(schedule))


def title(schedule: Schedule) -> str:
    """What a picture of ``schedule`` is called."""
    return f"{schedule.name}, {schedule.ranks} ranks, {schedule.microbatches} micro-batches"


def summary(timeline: Timeline) -> str:
    """The figures of ``timeline`` and, a row a rank, its picture in characters."""
    return "\n".join([*figures(timeline), "", text.draw(timeline), text.LEGEND])


def figures(timeline: Timeline) -> list[str]:
    """The figures of ``timeline`` in a few lines."""
    lines = [
        f"makespan {timeline.makespan:,.10g} µs   span {timeline.span:,.10g} µs   messages {timeline.messages}",
        f"bubble {timeline.bubble_ratio:.4f} of the makespan, {timeline.span_bubble_ratio:.4f} of the span",
        f"peak activations a rank: {' '.join(f'{peak:.4g}' for peak in timeline.peak_activations)}",
    ]
    waits = [sum(s.end - s.start for s in timeline.of_rank(rank) if s.op in WAITS) for rank in range(timeline.ranks)]
    if any(waits):
        lines.append(f"waits for messages a rank: {' '.join(f'{wait:,.4g}' for wait in waits)} µs")
    return lines
