"""``pipekern schedule simulate``: time, bubble and memory of a schedule under given costs."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from pipekern.cli.arguments import add_costs, costs_of
from pipekern.cli.output import emit, summary, title, write, write_picture
from pipekern.cli.schedule.given import add_schedule, facts, load
from pipekern.errors import ConfigError
from pipekern.plan.cluster import Link
from pipekern.plan.offload import Offload, offload_share, stays
from pipekern.schedule.simulate import Costs
from pipekern.trace.figure import FORMATS


def add(actions: Any) -> None:
    """Add the action to the parser's ``actions``."""
    parser = actions.add_parser("simulate", help="time, bubble and memory under given costs")
    add_schedule(parser)
    add_costs(parser, "pair", "gather", "reduce")
    parser.add_argument("--offload", type=float, metavar="SHARE", help="share of the largest peak to put away")
    parser.add_argument(
        "--copy", type=float, default=0.0, metavar="µs", help="of one activation to the host, or back (default 0)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="draw timeline and memory (.png .svg .pdf), or write a Chrome trace (.json)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    schedule = load(args)
    schedule.check()
    costs = costs_of(args)
    offload = stays(schedule) if args.offload is None else offload_share(schedule, args.offload)
    timeline = offload.simulate(costs)
    if args.output is not None and args.output.suffix in FORMATS:
        write_picture(offload, costs, args.output, args.memory)
    elif args.output is not None:
        write(timeline, args.output, title(schedule))
    data, text = facts(schedule) | timeline.to_dict(), summary(timeline)
    if args.offload is not None:
        late = _late(offload, costs, args.copy)
        data |= {"offload": [list(map(list, trips)) for trips in offload.trips], "stalls": late}
        text += f"\noffload: {offload}\nwaits for copies a rank: {' '.join(f'{time:,.4g}' for time in late)} µs"
    emit(args.json, data, text)
    return 0


def _late(offload: Offload, costs: Costs, copy: float) -> list[float]:
    """What each rank waits, where one activation through its whole share takes ``copy`` µs each way."""
    schedule = offload.schedule
    if not (copy >= 0 and math.isfinite(copy)):
        raise ConfigError(f"--copy {copy}: give the microseconds of a copy, at least 0")
    times = [copy / (schedule.share(stage) * schedule.slices) for stage in range(schedule.stages)]
    return offload.stalls(costs, times, Link(bandwidth=1e6))
