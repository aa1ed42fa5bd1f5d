"""Seq1F1B: 1F1B over slices of the sequence instead of whole micro-batches; the backwards take the slices in reverse.

Grid of 2 ranks, 2 slices a micro-batch and 3 micro-batches at F = B = W = 1::

    rank 0 F0F1F2....B1bbF3B0bbF4B3bbF5B2bb..B5bbB4bb
    rank 1 ..F0F1B1bbF2B0bbF3B3bbF4B2bbF5B5bbB4bb....

``chunks`` is the number of slices q, all equal here; micro-batch numbers count slices. Bubble (p - 1)(F + B + W) / q a
rank; p - r + q - 1 slices of activations on rank r. (Sun et al., Seq1F1B, 2024.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipekern.schedule.ir import Action
from pipekern.schedule.one_f_one_b import warm_up_pairs_drain
from pipekern.schedule.registry import MANY_CHUNKS, Grid, in_order, register


@register("seq1f1b", chunks=MANY_CHUNKS, placement=in_order, sliced=True, runnable=False)
def seq1f1b(grid: Grid) -> Iterator[Iterable[Action]]:
    """The rows of all ranks: a warm-up of ``p - r - 2 + q`` slices, then as 1F1B."""
    ranks, microbatches, slices, _ = grid
    for rank in range(ranks):
        forwards = [Action("F", rank, unit) for unit in range(microbatches * slices)]
        backwards = [
            Action("BW", rank, microbatch * slices + piece)
            for microbatch in range(microbatches)
            for piece in reversed(range(slices))
        ]
        yield warm_up_pairs_drain(forwards, backwards, ranks - rank - 2 + slices)
