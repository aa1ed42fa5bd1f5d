"""A timeline in characters, for the terminal and for docstrings."""

from __future__ import annotations

from pipekern.trace.timeline import Span, Timeline

LEGEND = "F forward  B backward (input and weights, or input)  W weights  < wait to receive  > wait to send  . idle"
_FILL = {"F": "f", "B": "b", "W": "w", "BW": "b", "SEND": ">", "RECV": "<"}


def draw(timeline: Timeline, width: int = 100) -> str:
    """A row a rank, ``width`` characters for the makespan, which start ``F3``: operation and micro-batch.

    With several stages a rank ``F3/4`` names the stage too. What is shorter than a character may vanish.
    """
    chunks = {(span.rank, span.stage) for span in timeline.spans}
    named = len(chunks) > len({rank for rank, _ in chunks})
    rows = [["."] * width for _ in range(timeline.ranks)]
    scale = width / max(timeline.makespan, max((span.end for span in timeline.spans), default=0), 1e-9)
    for span in timeline.spans:
        first, last = round(span.start * scale), round(span.end * scale)
        rows[span.rank][first:last] = _cells(span, last - first, named)
    digits = len(str(timeline.ranks - 1))
    return "\n".join(f"rank {rank:>{digits}} {''.join(row)}" for rank, row in enumerate(rows))


def _cells(span: Span, count: int, named: bool) -> str:
    fill = _FILL[span.op]
    if fill in "<>":
        return fill * count
    label = f"{span.op[0]}{span.microbatch}" + f"/{span.stage}" * named
    return label.ljust(count, fill)[:count] if len(label) <= count else fill.upper().ljust(count, fill)[:count]
