"""``pipekern trace``: what a run has left, in figures or drawn."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipekern.cli.output import emit, summary, write
from pipekern.errors import ConfigError
from pipekern.trace.chrome import from_chrome
from pipekern.trace.timeline import Timeline


def add(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser("trace", help="figures of a run folder's trace.json, or of a timeline's JSON")
    parser.add_argument("path", type=Path, metavar="FOLDER|FILE")
    parser.add_argument("-o", "--output", type=Path, help="write a picture (.png .svg .pdf) or a Chrome trace (.json)")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    timeline = read(args.path)
    if args.output is not None:
        write(timeline, args.output, args.path.stem)
    emit(args.json, timeline.to_dict(), summary(timeline))
    return 0


def read(path: Path) -> Timeline:
    """The timeline in a folder's trace.json, or in a file, Chrome trace or ``Timeline.to_dict``."""
    file = path / "trace.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; give a run folder with a trace.json, or a trace") from None
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON ({error}); give a run folder with a trace.json, or a trace") from None
    if "traceEvents" in data:
        return from_chrome(data)
    if "spans" in data:
        return Timeline.from_dict(data)
    raise ConfigError(f"{file} has neither 'traceEvents' nor 'spans'; give a run folder with a trace.json, or a trace")
