"""The measured timeline of a step, out of the clocks that every rank's executor kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from pipekern.runtime.assembly import Assembly
from pipekern.runtime.executor import Executor, Placed, place
from pipekern.schedule.comms import SENDS, Program
from pipekern.trace.timeline import COLLECTIVES, Span, Timeline

_KINDS = {"SEND_F": "SEND", "SEND_B": "SEND", "RECV_F": "RECV", "RECV_B": "RECV"}


def gathered(parts: Assembly, executor: Executor) -> Timeline:
    """The timeline of what ``executor`` ran last, in microseconds from the first rank's start; collective."""
    beside = [] if parts.store is None or executor is not parts.train else parts.store.spans
    done = [row for row in beside if row[3].done()]
    between = [(COLLECTIVES.index(op), stage, i, one.started, one.ended) for op, stage, i, one in done]
    own = torch.tensor(executor.times, dtype=torch.int64), parts.peaks(), torch.tensor(between, dtype=torch.int64)
    rows = parts.star.gather(own)
    times, peaks = [clock.tolist() for clock, *_ in rows], [peak for _, held, _ in rows for peak in held]
    program = executor.program
    placed = [executor.placed] if parts.star.rank is None else [place(program, rank) for rank in range(len(times))]
    return measured(program, placed, times, peaks, [part.reshape(-1, 5).tolist() for *_, part in rows])


def measured(
    program: Program,
    placed: Sequence[Sequence[Placed]],
    times: Sequence[Sequence[int]],
    peaks: Sequence[float],
    between: Sequence[Sequence[Sequence[int]]] = (),
) -> Timeline:
    """The timeline of ``program``, in microseconds from the first rank's start.

    ``placed`` and ``times`` (ns, one more than there are instructions) are by process; ``peaks``, the most activations
    held, by rank; ``between`` what went on between replicas, by rank: kind, stage, bucket, start and end (ns).
    """
    start = min((row[0] for row in times if row), default=0)
    spans = [span for row, clock in zip(placed, times, strict=True) for span in _spans(row, clock, start)]
    for rank, row in enumerate(between):
        for kind, stage, index, begin, end in row:
            spans.append(Span(rank, COLLECTIVES[kind], stage, index, (begin - start) / 1e3, (end - start) / 1e3))
    messages = sum(one.op in SENDS for row in program.instructions for one in row)
    return Timeline.measured(spans, program.schedule.ranks, peaks, messages)


def _spans(placed: Sequence[Placed], times: Sequence[int], start: int) -> Iterator[Span]:
    for (rank, (op, stage, microbatch, _)), (begin, end) in zip(placed, pairwise(times), strict=False):
        if op not in COLLECTIVES:  # only begun there
            yield Span(rank, _KINDS.get(op, op), stage, microbatch, (begin - start) / 1e3, (end - start) / 1e3)
