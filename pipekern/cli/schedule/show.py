"""``pipekern schedule show``: the text form, drawn below it; a picture or a file where asked for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipekern.cli.output import emit, write_picture, write_schedule
from pipekern.cli.schedule.given import add_schedule, facts, load, text_of_rows
from pipekern.errors import ScheduleError
from pipekern.plan.offload import stays
from pipekern.schedule.ir import Schedule
from pipekern.schedule.order import part_that_runs
from pipekern.schedule.simulate import Costs
from pipekern.trace import text

UNIT = Costs(1, 1, 1)


def add(actions: Any) -> None:
    """Add the action to the parser's ``actions``."""
    parser = actions.add_parser("show", help="print the text form and draw it; the output is a FILE again")
    add_schedule(parser)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw timeline and memory at unit costs (.png .svg .pdf)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the text form, or torch's CSV (.csv)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    schedule = load(args)
    faults: Sequence[str] = ()
    try:
        schedule.check()
    except ScheduleError as error:
        faults = error.faults
    about = facts(schedule)
    notes = [", ".join(f"{key} {value}" for key, value in about.items() if isinstance(value, bool))]
    if not _misshapen(schedule):
        notes += [*_drawing(schedule), text.LEGEND]
        if args.plot is not None:
            write_picture(stays(part_that_runs(schedule)), UNIT, args.plot, args.memory)
    if args.output is not None:
        write_schedule(schedule, args.output)
    data = about | {"actions": text_of_rows(schedule), "faults": list(faults)}
    emit(args.json, data, str(schedule) + "\n".join(f"# {note}" for note in (*notes, *faults)))
    return 1 if faults else 0


def _misshapen(schedule: Schedule) -> bool:
    """Whether there are actions of stages or micro-batches that there are not, so that no time can be given them."""
    stages, microbatches = range(schedule.stages), range(schedule.units)
    return any(a.stage not in stages or a.microbatch not in microbatches for row in schedule.actions for a in row)


def _drawing(schedule: Schedule) -> list[str]:
    """The grid at unit costs, as far as the order runs; a character is half a unit where that fits a terminal."""
    timeline = part_that_runs(schedule).simulate(UNIT)
    return text.draw(timeline, min(round(timeline.makespan * 2 * schedule.chunks), 200)).splitlines()
