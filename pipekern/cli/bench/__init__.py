"""``pipekern bench``: one file an action. Loads torch, and Triton where it is there, when it runs."""

from __future__ import annotations

from typing import Any

from pipekern.cli.bench import kernels


def add(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser("bench", help="measure kernels beside torch's and other libraries'")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    kernels.add(actions)
