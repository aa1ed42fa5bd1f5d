"""ZB-H2: a warm-up twice as long as that of ZB-H1, so that no rank is idle between its first and last action.

Grid of 3 ranks and 6 micro-batches at F = B = W = 1::

    rank 0 F0F1F2F3F4B0W0F5B1W1B2W2B3W3B4W4B5W5....
    rank 1 ..F0F1F2B0F3B1F4B2W0F5B3W1B4W2B5W3W4W5..
    rank 2 ....F0B0F1B1F2B2F3B3F4B4W0F5B5W1W2W3W4W5

Bubble (p - 1)(F + B + 2c - 2W) a rank, by span, where W <= F and m >= 2p - 1; at most 2p - 1 activations. With a cap k
on memory from p to 2p - 1 the warm-up is cut to what fits, and the bubble at F = B = W = 1 is the smallest there is,
2p - 1 - min(k, m).
(Qi et al., Zero Bubble Pipeline Parallelism, 2023.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from pipekern.schedule.ir import Action
from pipekern.schedule.registry import Grid, register
from pipekern.schedule.rules import at_least
from pipekern.schedule.zb_h1 import zero_bubble


@register("zb-h2")
def zb_h2(grid: Grid) -> Iterator[Iterable[Action]]:
    """The rows of all ranks: at most ``2(p - r - 1)`` forwards ahead; the first W after ``2r`` of the B."""
    ranks, microbatches, _, memory = grid
    held = 2 * ranks - 1
    if memory is not None:
        at_least("zb-h2", "memory", memory, min(ranks, microbatches))
        held = max(ranks, math.floor(min(memory, held)))
    for rank in range(ranks):
        warm_up = min(2 * (ranks - rank - 1), held - rank - 1)
        yield zero_bubble(rank, microbatches, warm_up, held - 1 - warm_up)
