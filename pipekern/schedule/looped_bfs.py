"""Looped breadth-first: a chunk at a time, all its micro-batches; the backwards take the chunks in reverse.

Grid of 2 ranks, 2 chunks each (``B0/3``: of stage 3) and 3 micro-batches at F = B = W = 1::

    rank 0 F0F1F2F0F1F2......B0/2B1/2B2/2B0/0B1/0B2/0
    rank 1 ..F0F1F2F0F1F2B0/3B1/3B2/3B0/1B1/1B2/1....

Bubble (p - 1)(F + B + W) / v a rank with v chunks, peak m activations.
"""

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
