"""GPipe: all forwards, then all backwards.

Grid of 3 ranks and 4 micro-batches at F = B = W = 1::

    rank 0 F0F1F2F3............B0bbB1bbB2bbB3bb
    rank 1 ..F0F1F2F3......B0bbB1bbB2bbB3bb....
    rank 2 ....F0F1F2F3B0bbB1bbB2bbB3bb........

Bubble (p - 1)(F + B + W) a rank, peak m activations.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipekern.schedule.ir import Action
from pipekern.schedule.registry import Grid, register


@register("gpipe")
def gpipe(grid: Grid) -> Iterator[list[Action]]:
    """The rows of all ranks."""
    for rank in range(grid.ranks):
        yield [Action(op, rank, microbatch) for op in ("F", "BW") for microbatch in range(grid.microbatches)]
