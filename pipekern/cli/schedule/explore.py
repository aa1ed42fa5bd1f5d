"""``pipekern schedule explore``: the page that redraws schedules while their values are dragged."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipekern.cli.output import emit
from pipekern.cli.schedule.given import read
from pipekern.schedule.explore import page


def add(actions: Any) -> None:
    """Add the action to the parser's ``actions``."""
    parser = actions.add_parser("explore", help="write a page for the browser, which works offline")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="schedules of your own to offer in it")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")
    parser.set_defaults(run=_run, json=False)


def _run(args: argparse.Namespace) -> int:
    schedules = [read(path) for path in args.files]
    for schedule in schedules:
        schedule.check()
    args.output.write_text(page(schedules), encoding="utf-8")
    emit(False, {}, f"{args.output}: open it in a browser")
    return 0
