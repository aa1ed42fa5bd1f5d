"""ZB-H1: 1F1B whose weight gradients are put off, so that they fill the drain; no more activations than 1F1B.

Grid of 3 ranks and 4 micro-batches at F = B = W = 1::

    rank 0 F0F1F2....B0W0F3B1W1B2W2B3W3
    rank 1 ..F0F1..B0F2B1W0F3B2W1B3W2W3
    rank 2 ....F0B0F1B1F2B2W0F3B3W1W2W3

Bubble (p - 1)(F + B - W) a rank, by span; 4(p - 1)c more under latency c up to W / 2 where F = B = W and m > p.
The formula needs W <= F. Every rank holds p activations, part of them only from B to W.
(Qi et al., Zero Bubble Pipeline Parallelism, 2023.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipekern.schedule.ir import Action
from pipekern.schedule.one_f_one_b import warm_up_pairs_drain
from pipekern.schedule.registry import Grid, register


@register("zb-h1")
def zb_h1(grid: Grid) -> Iterator[Iterable[Action]]:
    """The rows of all ranks: the warm-up of 1F1B, and a W after each B but the first ``r``."""
    for rank in range(grid.ranks):
        yield zero_bubble(rank, grid.microbatches, grid.ranks - rank - 1, rank)


def zero_bubble(rank: int, microbatches: int, warm_up: int, lag: int) -> Iterator[Action]:
    """One forward, one backward after ``warm_up`` forwards; each W follows the B that is ``lag`` behind its own."""
    forwards = [Action("F", rank, microbatch) for microbatch in range(microbatches)]
    backwards = [Action("B", rank, microbatch) for microbatch in range(microbatches)]
    for action in warm_up_pairs_drain(forwards, backwards, warm_up):
        yield action
        if action.op == "B" and action.microbatch >= lag:
            yield Action("W", rank, action.microbatch - lag)
    for microbatch in range(max(microbatches - lag, 0), microbatches):
        yield Action("W", rank, microbatch)
