"""Looped breadth-first: a chunk at a time, all its micro-batches; the backwards take the chunks in reverse."""

from __future__ import annotations

from collections.abc import Iterator

from pipekern.schedule.ir import Action
from pipekern.schedule.registry import MANY_CHUNKS, Grid, register


@register("looped-bfs", chunks=MANY_CHUNKS)
def looped_bfs(grid: Grid) -> Iterator[list[Action]]:
    """The rows of all ranks."""
    for rank in range(grid.ranks):
        stages = range(rank, grid.ranks * grid.chunks, grid.ranks)
        forwards = [Action("F", stage, microbatch) for stage in stages for microbatch in range(grid.microbatches)]
        backwards = [Action("BW", stage, i) for stage in stages[::-1] for i in range(grid.microbatches)]
        yield forwards + backwards
