"""A timeline in characters, for the terminal and for docstrings."""

from __future__ import annotations

from pipekern.trace.timeline import COLLECTIVES, Span, Timeline

LEGEND = "F forward  B backward  W weight gradient  < wait to receive  > wait to send  . idle"
BESIDE = "g values gathered  r gradients summed, between replicas"
_FILL = {
    "F": "f", "B": "b", "W": "w", "BW": "b", "SEND": ">", "RECV": "<", "JOIN": "<", "GATHER": "g", "REDUCE": "r",
    "AWAY": "^", "BACK": "v",
}  # fmt: skip


def draw(timeline: Timeline, width: int = 100) -> str:
    """A row a rank, ``width`` characters for the makespan, which start ``F3``: operation and micro-batch.

    With several stages a rank ``F3/4`` names the stage too. Labels are cut to what fits, and what is shorter than
    half a character may vanish. Where values go between replicas, each rank has a second row for that.
    """
    chunks = {(span.rank, span.stage) for span in timeline.spans}
    named = len(chunks) > len({rank for rank, _ in chunks})
    rows, beside = ([["."] * width for _ in range(timeline.ranks)] for _ in range(2))
    scale = width / max(timeline.makespan, max((span.end for span in timeline.spans), default=0), 1e-9)
    for span in timeline.spans:
        first, last = round(span.start * scale), round(span.end * scale)
        target = beside if span.op in COLLECTIVES else rows
        target[span.rank][first:last] = _cells(span, last - first, named)
    digits = len(str(timeline.ranks - 1))
    lines = [f"rank {rank:>{digits}} {''.join(row)}" for rank, row in enumerate(rows)]
    if any(span.op in COLLECTIVES for span in timeline.spans):
        below = [" " * (digits + 6) + "".join(row) for row in beside]
        lines = [line for pair in zip(lines, below, strict=True) for line in pair]
    return "\n".join(lines)


def _cells(span: Span, count: int, named: bool) -> str:
    fill = _FILL[span.op]
    if fill in "<>gr":
        return fill * count
    short = f"{span.op[0]}{span.microbatch}"
    labels = [f"{short}/{span.stage}", short] if named else [short]
    label = next((label for label in labels if len(label) <= count), span.op[0])
    return label.ljust(count, fill)[:count]
