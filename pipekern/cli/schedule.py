"""``pipekern schedule show|check|simulate``: a schedule by its name, or from a file in the text form."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipekern.cli.output import emit, summary, write
from pipekern.errors import ConfigError, ScheduleError
from pipekern.schedule.ir import Schedule
from pipekern.schedule.order import part_that_runs
from pipekern.schedule.registry import build, names
from pipekern.schedule.simulate import Cost, Costs
from pipekern.trace import text


def add(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    actions = commands.add_parser("schedule", help="show, check or simulate a schedule").add_subparsers(
        required=True, metavar="ACTION"
    )
    show = actions.add_parser("show", help="print the text form and draw it; the output is a FILE again")
    check = actions.add_parser("check", help="list every fault; exit 1 if there is any")
    simulate = actions.add_parser("simulate", help="time, bubble and memory under given costs")
    for parser, run in ((show, _show), (check, _check), (simulate, _simulate)):
        parser.add_argument("schedule", metavar="NAME|FILE", help=f"{', '.join(names())}, a file, or - for stdin")
        parser.add_argument("--ranks", type=int)
        parser.add_argument("--microbatches", type=int)
        parser.add_argument("--chunks", type=int, help="stages a rank (default: what the schedule needs)")
        parser.add_argument("--memory", type=float, help="cap of the peak a rank, in activations of its whole share")
        parser.add_argument("--json", action="store_true")
        parser.set_defaults(run=run)
    for name, default in (("forward", 1), ("backward", 1), ("weight", 1), ("comm", 0), ("pair", None)):
        simulate.add_argument(
            f"--{name}", type=cost, default=default, help=f"µs, or a,b,c: one a stage (default {default})"
        )
    simulate.add_argument("--kept", type=float, default=1.0, help="share of an activation held from B to W (default 1)")
    simulate.add_argument(
        "-o", "--output", type=Path, help="write a picture (.png .svg .pdf) or a Chrome trace (.json)"
    )


def cost(word: str) -> Cost:
    """``3``, or ``3,4,5``: one a stage."""
    values = [int(part) if part.strip().isdecimal() else float(part) for part in word.split(",")]
    return values if "," in word else values[0]


def _schedule(args: argparse.Namespace) -> Schedule:
    name: str = args.schedule
    sizes = {"ranks": args.ranks, "microbatches": args.microbatches}
    if name not in names() and (name == "-" or Path(name).is_file()):
        if {*sizes.values(), args.chunks, args.memory} != {None}:
            raise ConfigError(
                f"{name}: a file says its own sizes; leave out --ranks, --microbatches, --chunks, --memory"
            )
        return Schedule.parse(sys.stdin.read() if name == "-" else Path(name).read_text())
    if name not in names() and Path(name).name != Path(name).stem:
        raise ConfigError(f"{name} does not exist; give a schedule's name or a file in the text form")
    if name in names():
        missing = [f"--{size}" for size, value in sizes.items() if value is None]
        if missing:
            raise ConfigError(f"{name} needs {' and '.join(missing)}")
    return build(
        name, ranks=args.ranks or 1, microbatches=args.microbatches or 1, chunks=args.chunks, memory=args.memory
    )


def _facts(schedule: Schedule) -> dict[str, Any]:
    return {
        "name": schedule.name,
        "ranks": schedule.ranks,
        "microbatches": schedule.microbatches,
        "chunks": schedule.chunks,
        "stage_rank": schedule.stage_rank,
        "synchronous": schedule.synchronous,
        "duplicates_weights": schedule.duplicates_weights,
        "runnable": schedule.runnable,
    }


def _show(args: argparse.Namespace) -> int:
    schedule = _schedule(args)
    faults: Sequence[str] = ()
    try:
        schedule.check()
    except ScheduleError as error:
        faults = error.faults
    drawn = [] if _misshapen(schedule) else [*_drawing(schedule), text.LEGEND]
    facts = _facts(schedule)
    notes = [", ".join(f"{key} {value}" for key, value in facts.items() if isinstance(value, bool)), *drawn, *faults]
    data = facts | {"actions": [[str(action) for action in row] for row in schedule.actions], "faults": list(faults)}
    emit(args.json, data, str(schedule) + "\n".join(f"# {note}" for note in notes))
    return 1 if faults else 0


def _misshapen(schedule: Schedule) -> bool:
    """Whether there are actions of stages or micro-batches that there are not, so that no time can be given them."""
    stages, microbatches = range(schedule.stages), range(schedule.units)
    return any(a.stage not in stages or a.microbatch not in microbatches for row in schedule.actions for a in row)


def _drawing(schedule: Schedule) -> list[str]:
    """The grid at unit costs, as far as the order runs; a character is half a unit where that fits a terminal."""
    timeline = part_that_runs(schedule).simulate(Costs(1, 1, 1))
    return text.draw(timeline, min(round(timeline.makespan * 2 * schedule.chunks), 200)).splitlines()


def _check(args: argparse.Namespace) -> int:
    schedule = _schedule(args)
    slots = {f"{source}->{target}": count for (source, target), count in schedule.program().slots.items()}
    line = f"{schedule.name}: no fault; {schedule.ranks} ranks, {schedule.microbatches} micro-batches"
    links = ", ".join(f"{link} {count}" for link, count in slots.items()) or "none"
    emit(args.json, {"ok": True, "faults": [], "slots": slots}, f"{line}\nslots a link: {links}")
    return 0


def _simulate(args: argparse.Namespace) -> int:
    schedule = _schedule(args)
    schedule.check()
    timeline = schedule.simulate(
        Costs(args.forward, args.backward, args.weight, comm=args.comm, kept=args.kept, pair=args.pair)
    )
    if args.output is not None:
        write(timeline, args.output, f"{schedule.name}, {schedule.ranks} ranks, {schedule.microbatches} micro-batches")
    emit(args.json, _facts(schedule) | timeline.to_dict(), summary(timeline))
    return 0
