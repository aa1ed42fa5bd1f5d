"""The command line. Exit codes: 0 all is well, 1 a fault was found, 2 wrong usage."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pipekern._version import __version__
from pipekern.cli import bench, doctor, plan, schedule, trace
from pipekern.cli.output import emit
from pipekern.errors import ConfigError, ScheduleError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``argv`` (default: the process's own arguments); returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="pipekern", description="Pipeline parallel training: schedules, plans, traces, health."
    )
    parser.add_argument("--version", action="version", version=f"pipekern {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (schedule, plan, bench, trace, doctor):
        command.add(commands)
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except ScheduleError as error:
        emit(args.json, {"ok": False, "error": str(error), "faults": error.faults}, f"error: {error}")
        return 1
    except ConfigError as error:
        emit(args.json, {"ok": False, "error": str(error)}, f"error: {error}")
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
