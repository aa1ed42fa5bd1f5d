"""``pipekern schedule search``: the best schedule that can be found under a cap on memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from pipekern.cli.arguments import add_costs, add_sizes, costs_of
from pipekern.cli.output import emit, figures, write_picture, write_schedule
from pipekern.cli.schedule.given import facts, text_of_rows
from pipekern.plan.offload import stays
from pipekern.schedule.search import OBJECTIVES, Placement, SearchResult, search
from pipekern.trace import text
from pipekern.trace.timeline import Timeline


def add(actions: Any) -> None:
    """Add the action to the parser's ``actions``."""
    parser = actions.add_parser("search", help="the best schedule under a cap on memory; the output is a FILE")
    add_sizes(parser)
    parser.add_argument("--memory", type=float, help="cap of the peak a rank, in activations of its whole share")
    parser.add_argument(
        "--placement", choices=get_args(Placement), default="any", help="chunks a rank: one, or two in a V"
    )
    parser.add_argument("--objective", choices=OBJECTIVES, default="span", help="what to make short (default span)")
    parser.add_argument("--effort", type=int, default=1, help="multiplies the work (default 1)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the text form, or torch's CSV (.csv)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw timeline and memory (.png .svg .pdf)")
    parser.add_argument("--json", action="store_true")
    add_costs(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    costs = costs_of(args)
    best = search(
        args.ranks,
        args.microbatches,
        costs,
        args.memory,
        args.placement,
        objective=args.objective,
        effort=args.effort,
    )
    timeline = best.simulate(costs)
    if args.output is not None:
        write_schedule(best, args.output)
    if args.plot is not None:
        write_picture(stays(best), costs, args.plot, args.memory)
    data = facts(best) | {"objective": args.objective, "lower_bound": best.lower_bound, "gap": best.gap}
    data |= timeline.to_dict() | {"actions": text_of_rows(best)}
    emit(args.json, data, _report(best, timeline, args.objective))
    return 0


def _report(best: SearchResult, timeline: Timeline, objective: str) -> str:
    """The text form, with the figures as comments."""
    proof = "none is better" if not best.gap else f"this is {best.gap:.2%} above it"
    bound = f"lower bound of the {objective} {best.lower_bound:,.10g} µs: {proof}"
    drawn = text.draw(timeline, _width(best, timeline)).splitlines()
    return str(best) + "\n".join(f"# {note}" for note in (*figures(timeline), bound, *drawn, text.LEGEND))


def _width(best: SearchResult, timeline: Timeline) -> int:
    """Characters for the makespan: two for an action of mean length where that fits a terminal."""
    mean = sum(timeline.busy) / sum(map(len, best.actions))
    return min(round(2 * timeline.makespan / mean) if mean else 100, 200)
