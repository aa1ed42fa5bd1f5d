"""``pipekern schedule``: one file an action."""

from __future__ import annotations

from typing import Any

from pipekern.cli.schedule import check, compare, explore, search, show, simulate


def add(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser("schedule", help="show, check, simulate, compare, search or explore schedules")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for action in (show, check, simulate, compare, search, explore):
        action.add(actions)
