"""Interleaved zero bubble: interleaved 1F1B whose weight gradients fill the waits; no more activations than it holds.

Grid of 2 ranks, 2 chunks each and 4 micro-batches at F = B = W = 1::

    rank 0 F0/0F1/0F0/2F1/2F2/0B0/2W0/2F3/0B1/2W1/2F2/2B0/0W0/0F3/2B1/0B2/2W1/0W2/2B3/2B2/0B3/0W3/2W2/0W3/0....
    rank 1 ....F0/1F1/1F0/3B0/3F1/3B1/3F2/1B0/1W0/3F3/1B1/1W1/3F2/3B2/3W0/1F3/3B3/3B2/1B3/1W1/1W2/3W3/3W2/1W3/1

Bubble (p - 1) F / v a rank with v chunks at F = B = W, which is the way of the first micro-batch to the last rank, and
a third of interleaved 1F1B's; the peak is that of its fullest rank, (vp + p - 1) / v activations where m > p.
"""

from __future__ import annotations

from pipekern.schedule.interleaved import interleaved_row
from pipekern.schedule.ir import Action
from pipekern.schedule.registry import MANY_CHUNKS, Grid, register
from pipekern.schedule.rules import multiple
from pipekern.schedule.weave import weave


@register("zb-interleaved", chunks=MANY_CHUNKS)
def zb_interleaved(grid: Grid) -> list[list[Action]]:
    """The rows of all ranks: those of interleaved 1F1B, woven."""
    multiple("zb-interleaved", "microbatches", grid.microbatches, grid.ranks, "ranks")
    return weave([interleaved_row(rank, grid) for rank in range(grid.ranks)])
