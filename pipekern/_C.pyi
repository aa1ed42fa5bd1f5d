# ruff: noqa: N999
"""Types of the compiled part: csrc/bindings."""

from collections.abc import Sequence
from enum import Enum

def digest(pointer: int, bytes: int, seed: int) -> int: ...

class StreamRule(Enum):
    ONE_F_ONE_B = ...
    ZB_H1 = ...
    ZB_H2 = ...

class StreamRank:
    first_start: int
    last_end: int
    busy: int
    held: int
    shrunk: int

def stream(
    rule: StreamRule,
    microbatches: int,
    forward: Sequence[int],
    backward: Sequence[int],
    weight: Sequence[int],
    comm: Sequence[int],
) -> list[StreamRank]: ...
