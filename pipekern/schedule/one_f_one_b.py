"""1F1B: after its warm-up a rank does one forward, one backward, so that few activations are held.

Grid of 3 ranks and 4 micro-batches at F = B = W = 1::

    rank 0 F0F1F2........B0bbF3B1bb..B2bb..B3bb
    rank 1 ..F0F1....B0bbF2B1bbF3B2bb..B3bb....
    rank 2 ....F0B0bbF1B1bbF2B2bbF3B3bb........

Bubble (p - 1)(F + B + W) a rank, peak p - r activations on rank r.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pipekern.schedule.ir import Action
from pipekern.schedule.registry import Grid, register


@register("1f1b")
def one_f_one_b(grid: Grid) -> Iterator[Iterable[Action]]:
    """The rows of all ranks: ``p - r - 1`` forwards; pairs of forward and backward; the rest of the backwards."""
    for rank in range(grid.ranks):
        forwards = [Action("F", rank, microbatch) for microbatch in range(grid.microbatches)]
        backwards = [Action("BW", rank, microbatch) for microbatch in range(grid.microbatches)]
        yield warm_up_pairs_drain(forwards, backwards, grid.ranks - rank - 1)


def warm_up_pairs_drain(forwards: Sequence[Action], backwards: Sequence[Action], warm_up: int) -> Iterator[Action]:
    """``warm_up`` forwards, then one forward and one backward in turn, then the remaining backwards."""
    warm_up = min(warm_up, len(forwards))
    yield from forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        yield forward
        yield backward
    yield from backwards[len(forwards) - warm_up :]
