"""``pipekern schedule simulate``: time, bubble and memory of a schedule under given costs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipekern.cli.arguments import add_costs, costs_of
from pipekern.cli.output import emit, summary, title, write, write_picture
from pipekern.cli.schedule.given import add_schedule, facts, load
from pipekern.trace.figure import FORMATS


def add(actions: Any) -> None:
    """Add the action to the parser's ``actions``."""
    parser = actions.add_parser("simulate", help="time, bubble and memory under given costs")
    add_schedule(parser)
    add_costs(parser, "pair", "gather", "reduce")
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
    timeline = schedule.simulate(costs)
    if args.output is not None and args.output.suffix in FORMATS:
        write_picture(schedule, costs, args.output, args.memory)
    elif args.output is not None:
        write(timeline, args.output, title(schedule))
    emit(args.json, facts(schedule) | timeline.to_dict(), summary(timeline))
    return 0
