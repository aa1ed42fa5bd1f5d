"""``pipekern schedule compare``: all schedules at the same ranks, micro-batches and costs."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipekern.cli.arguments import add_costs, add_sizes, costs_of
from pipekern.cli.output import emit
from pipekern.schedule.compare import Comparison, Figures, compare, figures
from pipekern.schedule.search import search
from pipekern.schedule.simulate import Costs
from pipekern.trace.compare import Point, draw

Found = dict[float, Figures]
_SHARES = {"makespan": "bubble", "span": "bubble of the span"}


def add(actions: Any) -> None:
    """Add the action to the parser's ``actions``."""
    parser = actions.add_parser("compare", help="all schedules beside each other; exit 1 if none can be built")
    add_sizes(parser)
    parser.add_argument("--chunks", type=int, help="for schedules that take so many (default: the fewest)")
    parser.add_argument("--memory", type=float, help="only schedules whose peak a rank is no higher")
    parser.add_argument("--by", choices=("makespan", "span"), default="makespan", help="what to sort by and to plot")
    parser.add_argument("--search", action="store_true", help="also what a search finds under each cap on memory")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bubble against peak memory (.png .svg .pdf)")
    parser.add_argument("--json", action="store_true")
    add_costs(parser, "pair")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    costs = costs_of(args)
    found = compare(args.ranks, args.microbatches, costs, chunks=args.chunks, memory=args.memory)
    if args.by == "span":
        found.figures.sort(key=lambda row: (row.span, row.makespan, row.peak, row.name))
    best = _searched(args, costs) if args.search else {}
    if args.plot is not None:
        points = [
            Point(row.name, row.peak, _bubble(row, args.by), row.runnable, row.duplicates_weights)
            for row in found.figures
        ]
        border = [(cap, _bubble(row, args.by)) for cap, row in best.items()]
        title = f"{args.ranks} ranks, {args.microbatches} micro-batches"
        draw(points, args.plot, title, found=border, limit=args.memory, axis=_SHARES[args.by])
    emit(args.json, _data(args, found, best), _table(found, best))
    return 0 if found.figures else 1


def _bubble(row: Figures, by: str) -> float:
    return row.bubble_ratio if by == "makespan" else row.span_bubble_ratio


def _searched(args: argparse.Namespace, costs: Costs) -> Found:
    """What a search finds under caps of 1, 2, … activations, up to twice the ranks: more has no use."""
    most = min(2 * args.ranks, args.microbatches, math.inf if args.memory is None else math.floor(args.memory))
    return {
        cap: figures(search(args.ranks, args.microbatches, costs, memory=cap, objective=args.by), costs)
        for cap in range(1, int(most) + 1)
    }


def _data(args: argparse.Namespace, found: Comparison, best: Found) -> dict[str, Any]:
    return {
        "ranks": args.ranks,
        "microbatches": args.microbatches,
        "memory": args.memory,
        "schedules": [asdict(row) for row in found.figures],
        "search": [{"memory": cap} | asdict(row) for cap, row in best.items()],
        "refused": found.refused,
    }


_HEAD = ("schedule", "chunks", "bubble", "by span", "makespan µs", "span µs", "peak", "messages")


def _table(found: Comparison, best: Found) -> str:
    cells = [_HEAD, *(_cells(row.name, row) for row in found.figures)]
    cells += [_cells(f"search, memory {cap:g}", row) for cap, row in best.items()]
    notes = ["", *map(_note, (*found.figures, *best.values()))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row, note in zip(cells, notes, strict=True):
        words = [row[0].ljust(widths[0]), *(word.rjust(width) for word, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join([*words, note]).rstrip())
    if found.refused:
        lines += ["", "not built:", *(f"  {reason}" for reason in found.refused.values())]
    return "\n".join(lines)


def _cells(name: str, row: Figures) -> tuple[str, ...]:
    shares = (f"{row.bubble_ratio:.2%}", f"{row.span_bubble_ratio:.2%}")
    return (
        name,
        str(row.chunks),
        *shares,
        f"{row.makespan:,.10g}",
        f"{row.span:,.10g}",
        f"{row.peak:.4g}",
        str(row.messages),
    )


def _note(row: Figures) -> str:
    notes = {
        "asynchronous": not row.synchronous,
        "weights twice": row.duplicates_weights,
        "simulated only": not row.runnable,
    }
    return ", ".join(note for note, holds in notes.items() if holds)
