"""ZB-V: two chunks a rank in V placement, so that the last stage is on the first rank; no bubble at F = B = W.

Grid of 2 ranks, 2 chunks each (``B0/3``: of stage 3) and 4 micro-batches at F = B = W = 1::

    rank 0 F0/0F1/0F2/0F0/3B0/3W0/3F1/3B1/3W1/3F3/0B0/0W0/0F2/3B2/3W2/3B1/0W1/0F3/3B3/3W3/3B2/0W2/0B3/0W3/0....
    rank 1 ....F0/1F0/2F1/1F1/2B0/2W0/2F2/1B0/1W0/1F2/2B1/2W1/2F3/1B1/1W1/1F3/2B2/2W2/2B2/1B3/2B3/1W2/1W3/2W3/1

Rank r holds stages r and 2p - 1 - r. No bubble, by span, where F = B = W and m >= 2p - 1; p activations on every rank.
(Qi et al., Pipeline Parallelism with Controllable Memory, 2024.)
"""

from __future__ import annotations

from collections.abc import Iterator

from pipekern.schedule.ir import Action
from pipekern.schedule.numbering import Token, numbered
from pipekern.schedule.registry import TWO_CHUNKS, Grid, register, zigzag


@register("zb-v", chunks=TWO_CHUNKS, placement=zigzag)
def zb_v(grid: Grid) -> Iterator[list[Action]]:
    """The rows of all ranks. With fewer than 2p - 1 micro-batches, those of 2p - 1 without the surplus."""
    microbatches = max(grid.microbatches, 2 * grid.ranks - 1)
    for rank in range(grid.ranks):
        actions = (Action(*item) for item in numbered(_row(grid.ranks, rank, microbatches)))
        yield [action for action in actions if action.microbatch < grid.microbatches]


def _row(ranks: int, rank: int, microbatches: int) -> list[Token]:
    """Chunk 0 is the rank's stage on the way there, chunk 1 that on the way back; F0 is the first to run out."""
    f0, f1, b0, b1, w0, w1 = (Token(op, stage) for op in "FBW" for stage in (rank, 2 * ranks - 1 - rank))
    below = ranks - rank
    ahead = 2 * below - 1 + rank
    return [
        *(2 * below - 1) * [f0],
        *rank * [f1, f0],
        *below * [f1, b1, w1],
        *(microbatches - ahead) * [f0, b0, w0, f1, b1, w1],
        *(ahead - ranks) * [b0, w0, f1, b1, w1],
        *rank * [b0, b1],
        *below * [b0, w0],
        *rank * [w1],
        *rank * [w0],
    ]
