"""``pipekern schedule check``: every fault of a schedule."""

from __future__ import annotations

import argparse
from typing import Any

from pipekern.cli.output import emit
from pipekern.cli.schedule.given import add_schedule, load


def add(actions: Any) -> None:
    """Add the action to the parser's ``actions``."""
    parser = actions.add_parser("check", help="list every fault; exit 1 if there is any")
    add_schedule(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    schedule = load(args)
    slots = {f"{source}->{target}": count for (source, target), count in schedule.program().slots.items()}
    line = f"{schedule.name}: no fault; {schedule.ranks} ranks, {schedule.microbatches} micro-batches"
    links = ", ".join(f"{link} {count}" for link, count in slots.items()) or "none"
    emit(args.json, {"ok": True, "faults": [], "slots": slots}, f"{line}\nslots a link: {links}")
    return 0
