"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from collections.abc import Iterator

from pipekern.schedule.ir import Action
from pipekern.schedule.registry import Grid, register


@register("gpipe")
def gpipe(grid: Grid) -> Iterator[list[Action]]:
    """The rows of all ranks."""
    for rank in range(grid.ranks):
        yield [Action(op, rank, microbatch) for op in ("F", "BW") for microbatch in range(grid.microbatches)]
