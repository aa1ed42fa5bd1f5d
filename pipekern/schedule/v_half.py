"""V-Half: V placement with about half the activations of 1F1B.

Grid of 2 ranks, 2 chunks each (``B0/3``: of stage 3) and 4 micro-batches at F = B = W = 1::

    rank 0 F0/0F1/0F2/0F0/3B0/3W0/3F1/3B1/3B0/0W0/0W1/3F2/3F3/0B2/3B1/0W1/0W2/3F3/3B3/3B2/0W2/0W3/3....B3/0W3/0
    rank 1 ....F0/1F0/2F1/1F1/2B0/2W0/2B0/1W0/1F2/1F2/2B1/2W1/2B1/1W1/1F3/1F3/2B2/2B2/1W2/2W2/1B3/2B3/1W3/2W3/1

Rank r holds stages r and 2p - 1 - r, and (p + 2) // 2 activations. At F = B = W and m >= 2p the bubble is, by span,
6p - 1 - 3M steps of one chunk, M = 2((p + 2) // 2) being the memory in chunks; for p = 2 it is 1.
(Qi et al., Pipeline Parallelism with Controllable Memory, 2024.)
"""

from __future__ import annotations

from pipekern.schedule.registry import TWO_CHUNKS, Grid, register, zigzag
from pipekern.schedule.v_pattern import Rows, repeated


@register("v-half", chunks=TWO_CHUNKS, placement=zigzag)
def v_half(grid: Grid) -> Rows:
    """The rows of all ranks."""
    return repeated(grid, _starts)


def _starts(ranks: int, rank: int) -> tuple[int, int, int, int]:
    """Of F0, F1, B1, B0. With an even number of ranks B waits three steps more: else two operations would collide."""
    wait = 0 if ranks % 2 else 3
    return 2 * rank, 3 * ranks - rank - 2, 3 * ranks + wait + 2 * rank - 1, 6 * ranks + wait - rank - 2
