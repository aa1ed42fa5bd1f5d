"""DualPipe: micro-batches enter at both ends, and the forward of one direction overlaps the backward of the other.

Text form of 4 ranks and 8 micro-batches, overlapped pairs joined by &::

    rank 0 0F0 0F1 0F2 7F4 7B4 7W4 7F5 0F3&7BW5 7F6&0BW0 7BW6 7F7&0BW1 7BW7 0B2 0W2 0B3 0W3
    rank 1 1F0 6F4 1F1 6F5 1F2 6BW4 6F6&1BW0 1F3&6BW5 6F7&1BW1 6BW6 1BW2 6B7 1B3 6W7 1W3
    rank 2 5F4 2F0 5F5 2F1 5F6 2BW0 2F2&5BW4 5F7&2BW1 2F3&5BW5 2BW2 5BW6 2B3 5B7 2W3 5W7
    rank 3 4F4 4F5 4F6 3F0 3B0 3W0 3F1 4F7&3BW1 3F2&4BW4 3BW2 3F3&4BW5 3BW3 4B6 4W6 4B7 4W7

Each rank holds a stage of either direction, so that every weight is there twice, and the gradients of both copies are
summed. Bubble (p/2 - 1)(F&B + BW - 3W), where F&B is one overlapped pair: exact where F = B >= W, and for F > B >= W
with F in the place of B; an upper bound where neither F nor W is longer than B. At most p + 1 activations.
(DeepSeek-V3 Technical Report, 2024.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipekern.schedule.numbering import Item, Token, numbered
from pipekern.schedule.registry import Grid, Row, opposed, register
from pipekern.schedule.rules import at_least, multiple


@register("dualpipe", placement=opposed, chains=2, runnable=False)
def dualpipe(grid: Grid) -> Iterator[Row]:
    """The rows of all ranks: the program of each half, mirrored; the micro-batches are shared equally."""
    ranks, microbatches, _, _ = grid
    multiple("dualpipe", "ranks", ranks, 2)
    multiple("dualpipe", "microbatches", microbatches, 2)
    at_least("dualpipe", "microbatches", microbatches, 2 * ranks)
    each = microbatches // 2
    for rank in range(ranks):
        there, back = rank, 2 * ranks - 1 - rank
        near, far = (there, back) if rank < ranks // 2 else (back, there)
        place = min(rank, ranks - 1 - rank)
        yield numbered(two_directions(ranks // 2, place, each, near, far), first={back: each})


def two_directions(ranks: int, rank: int, microbatches: int, near: int, far: int) -> Iterable[Item]:
    """The program of ``rank`` in a row of ``ranks``, with ``microbatches`` for each of its two stages.

    The forwards of ``near`` (0 below) come from the outer end of the row, those of ``far`` (1) from the inner one,
    whose rank is the last.
    """
    f0, f1, b0, b1, w0, w1, whole0, whole1 = (Token(op, s) for op in ("F", "B", "W", "BW") for s in (near, far))
    inner = ranks - 1 - rank
    # 1-3: F0, then F0 F1, then B1 W1 F1.
    yield from 2 * inner * [f0]
    yield from (rank + 1) * [f0, f1]
    yield from inner * [b1, w1, f1]
    # 4-5: pairs F0&B1 and F1&B0, then B1 alone. The innermost rank does not fuse its first, which would wait.
    for step in range(microbatches - 2 * ranks + rank + 1):
        if step == inner == 0:
            yield f0
            yield whole1
        else:
            yield f0, whole1
        yield f1, whole0
    for _ in range(inner):
        yield whole1
        yield f1, whole0
    # 6: B1 B0, the second half of them split. 7-8: the W of these fill the drain.
    yield from [(whole0, whole1)[index % 2 == 0] for index in range(rank + 1)]
    split = [(b0, b1)[index % 2 == 0] for index in range(rank + 1, 2 * rank + 2)]
    yield from split
    weights = [w0 if token == b0 else w1 for token in split] + inner * [w0]
    for weight in weights[:inner]:
        yield from (weight, b0)
    yield from weights[inner:]
