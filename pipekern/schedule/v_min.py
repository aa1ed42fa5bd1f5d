"""V-Min: V placement with about a third of the activations of 1F1B, the fewest that keep every rank busy.

Grid of 3 ranks, 2 chunks each (``B0/3``: of stage 3) and 3 micro-batches at F = B = W = 1::

    rank 0 F0/0F1/0F2/0........F0/5B0/5W0/5F1/5B1/5W1/5B0/0W0/0........F2/5B2/5B1/0W1/0W2/5....B2/0W2/0
    rank 1 ....F0/1F1/1....F0/4....F1/4B0/4W0/4F2/1B0/1W0/1B1/4W1/4F2/4....B1/1B2/4W1/1W2/4B2/1W2/1....
    rank 2 ........F0/2F0/3F1/2F1/3........B0/3B0/2W0/3W0/2F2/2F2/3B1/3B1/2W1/3W1/2B2/3B2/2W2/3W2/2....

Rank r holds stages r and 2p - 1 - r, and (p + 4) // 3 activations. At F = B = W and m >= 2p the bubble is, by span,
6p - 1 - 3M steps of one chunk, M = 2((p + 4) // 3) being the memory in chunks; for p = 2 it is 1.
(Qi et al., Pipeline Parallelism with Controllable Memory, 2024.)
"""

from __future__ import annotations

from pipekern.schedule.registry import TWO_CHUNKS, Grid, register, zigzag
from pipekern.schedule.v_pattern import Rows, repeated


@register("v-min", chunks=TWO_CHUNKS, placement=zigzag)
def v_min(grid: Grid) -> Rows:
    """The rows of all ranks."""
    return repeated(grid, _starts)


def _starts(ranks: int, rank: int) -> tuple[int, int, int, int]:
    """Of F0, F1, B1, B0. With a multiple of 3 ranks B waits two steps more: else two operations would collide."""
    wait = 0 if ranks % 3 else 2
    return rank, 2 * ranks - rank - 1, 2 * ranks + wait + rank, 4 * ranks + wait - rank - 1
