"""DualPipeV: the program of DualPipe on half the ranks, the two directions joined into one chain in V placement.

Text form of 2 ranks, 2 chunks each and 5 micro-batches, overlapped pairs joined by &::

    rank 0 0F0 0F1 0F2 3F0 3B0 3W0 3F1 0F3&3BW1 3F2&0BW0 0F4&3BW2 3F3&0BW1 3BW3 3F4&0BW2 3BW4 0B3 0W3 0B4 0W4
    rank 1 1F0 2F0 1F1 2F1 1F2 2BW0 2F2&1BW0 1F3&2BW1 2F3&1BW1 1F4&2BW2 2F4&1BW2 2BW3 1BW3 2B4 1B4 2W4 1W4

Rank r holds stages r and 2p - 1 - r, and no weight twice. Bubble (p - 1)(F&B + BW - 3W) in the times of one chunk, with
the provisos of DualPipe; at most 2p + 1 chunks' activations. (Liu, DualPipeV, 2025: "cut-in-half" DualPipe.)
"""

from __future__ import annotations

from collections.abc import Iterator

from pipekern.schedule.dualpipe import two_directions
from pipekern.schedule.numbering import numbered
from pipekern.schedule.registry import TWO_CHUNKS, Grid, Row, register, zigzag
from pipekern.schedule.rules import at_least


@register("dualpipev", chunks=TWO_CHUNKS, placement=zigzag)
def dualpipev(grid: Grid) -> Iterator[Row]:
    """The rows of all ranks."""
    ranks, microbatches, _, _ = grid
    at_least("dualpipev", "microbatches", microbatches, 2 * ranks)
    for rank in range(ranks):
        yield numbered(two_directions(ranks, rank, microbatches, rank, 2 * ranks - 1 - rank))
