"""The schedule that a command is given: by its name and sizes, or in a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pipekern.errors import ConfigError
from pipekern.schedule import torch_csv
from pipekern.schedule.ir import Schedule
from pipekern.schedule.registry import build, names


def add_schedule(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`load` reads."""
    known = ", ".join(names())
    parser.add_argument(
        "schedule", metavar="NAME|FILE", help=f"{known}, a file in the text form or torch's .csv, or - for stdin"
    )
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--microbatches", type=int)
    parser.add_argument("--chunks", type=int, help="stages a rank (default: what the schedule needs)")
    parser.add_argument("--memory", type=float, help="cap of the peak a rank, in activations of its whole share")
    parser.add_argument("--json", action="store_true")


def load(args: argparse.Namespace) -> Schedule:
    """The schedule that ``args`` name; raises ``ConfigError``, or ``ScheduleError`` for a file at fault."""
    name: str = args.schedule
    sizes = {"ranks": args.ranks, "microbatches": args.microbatches}
    if name not in names() and (name == "-" or Path(name).is_file()):
        if {*sizes.values(), args.chunks, args.memory} != {None}:
            raise ConfigError(
                f"{name}: a file says its own sizes; leave out --ranks, --microbatches, --chunks, --memory"
            )
        return Schedule.parse(sys.stdin.read()) if name == "-" else read(Path(name))
    if name not in names() and Path(name).name != Path(name).stem:
        raise ConfigError(f"{name} does not exist; give a schedule's name or a file in the text form")
    if name in names():
        missing = [f"--{size}" for size, value in sizes.items() if value is None]
        if missing:
            raise ConfigError(f"{name} needs {' and '.join(missing)}")
    return build(
        name, ranks=args.ranks or 1, microbatches=args.microbatches or 1, chunks=args.chunks, memory=args.memory
    )


def read(path: Path) -> Schedule:
    """The schedule in a file, in the text form or in torch's CSV; raises ``ConfigError`` where there is none."""
    try:
        content = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a file in the text form or torch's CSV") from None
    return torch_csv.loads(content, path.stem) if path.suffix == ".csv" else Schedule.parse(content)


def facts(schedule: Schedule) -> dict[str, Any]:
    """What a schedule is, apart from its actions."""
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


def text_of_rows(schedule: Schedule) -> list[list[str]]:
    """Every rank's actions as words, for JSON."""
    return [[str(action) for action in row] for row in schedule.actions]
