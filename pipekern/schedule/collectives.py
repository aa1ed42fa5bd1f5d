"""What goes between the replicas of a stage, as instructions of the program.

    GATHER s i   begin to fetch bucket i of stage s, before anything else       (shards of values, ZeRO)
    JOIN s 0     wait until those with parameters of stage s are there, before its first forward
    REDUCE s i   begin to sum bucket i of its gradients, after its last weight work and what that sends

Whoever begins one goes on at once. All replicas of a rank have the same program, so that they begin them in the same
order; the end of the step waits for the sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipekern.schedule.ir import Action


class Collectives(NamedTuple):
    """How many buckets of each stage are gathered, and summed."""

    gathers: Mapping[int, int] = {}
    reduces: Mapping[int, int] = {}


def first_forwards(row: Sequence[Action]) -> dict[int, Action]:
    """The first forward of each stage, in the order of ``row``."""
    found: dict[int, Action] = {}
    for action in row:
        if action.op == "F":
            found.setdefault(action.stage, action)
    return found


def last_weights(row: Sequence[Action]) -> dict[int, Action]:
    """The last weight work of each stage, in the order of ``row``."""
    found: dict[int, Action] = {}
    for action in reversed(row):
        if action.op in ("W", "BW"):
            found.setdefault(action.stage, action)
    return dict(reversed(found.items()))
