"""PipeDream-2BW: 1F1B that is never flushed, over the micro-batches of many batches.

Grid of 2 ranks and 6 micro-batches at F = B = W = 1::

    rank 0 F0F1....B0bbF2B1bbF3B2bbF4B3bbF5B4bb..B5bb
    rank 1 ..F0B0bbF1B1bbF2B2bbF3B3bbF4B4bbF5B5bb....

Each rank keeps two versions of its weights. A batch is a run of at least p micro-batches; its gradients are applied
one batch late, so the schedule is asynchronous. The bubble is paid once, not once a batch; at most p activations.
(Narayanan et al., Memory-Efficient Pipeline-Parallel DNN Training, 2020.)
"""

from __future__ import annotations

from collections.abc import Iterable

from pipekern.schedule.one_f_one_b import one_f_one_b
from pipekern.schedule.registry import Grid, Row, register
from pipekern.schedule.rules import at_least


@register("pipedream-2bw", synchronous=False, runnable=False)
def pipedream_2bw(grid: Grid) -> Iterable[Row]:
    """The rows of all ranks for ``microbatches`` in a row, those of any number of batches."""
    at_least("pipedream-2bw", "microbatches", grid.microbatches, grid.ranks)
    return one_f_one_b(grid)
