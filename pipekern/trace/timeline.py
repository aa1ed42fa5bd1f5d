"""What every rank did, and when: the outcome of a simulation and of a measured step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

COMPUTE = ("F", "B", "W", "BW")
WAITS = ("SEND", "RECV", "JOIN")
COLLECTIVES = ("GATHER", "REDUCE")


class Span(NamedTuple):
    """One thing that a rank did, from ``start`` to ``end`` in microseconds.

    ``op`` is F, B, W or BW; SEND, RECV and JOIN for the wait for a free slot, for a message, and for gathered values;
    GATHER and REDUCE for what goes on between replicas beside the rank's work (``microbatch`` counts buckets); AWAY and
    BACK where an activation has left the device, and where it begins to come back.
    """

    rank: int
    op: str
    stage: int
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of all ranks, rank by rank in program order, and what follows from them.

    Times are in microseconds. ``makespan`` runs from 0 to the last end; ``span`` is the largest, over ranks, of last
    end minus first start; ``busy`` is the time a rank computes; ``peak_activations`` is the most that a rank holds,
    in activations of one micro-batch through its whole share; ``messages`` counts those between ranks.
    """

    spans: tuple[Span, ...]
    makespan: float
    span: float
    busy: list[float]
    peak_activations: list[float]
    messages: int

    @classmethod
    def measured(cls, spans: Iterable[Span], ranks: int, peak_activations: Sequence[float], messages: int) -> Timeline:
        """The timeline of spans that were measured from the start of the step, in any order of ranks."""
        ordered = tuple(sorted(spans, key=lambda span: span.rank))
        rows: list[list[Span]] = [[] for _ in range(ranks)]
        for span in ordered:
            if span.op in COMPUTE:
                rows[span.rank].append(span)
        ends = [max((span.end for span in row), default=0.0) for row in rows]
        starts = [min((span.start for span in row), default=0.0) for row in rows]
        busy = [sum(span.end - span.start for span in row) for row in rows]
        longest = max((end - start for start, end in zip(starts, ends, strict=True)), default=0.0)
        return cls(ordered, max(ends, default=0.0), longest, busy, list(peak_activations), messages)

    @property
    def ranks(self) -> int:
        return len(self.busy)

    @property
    def bubble_ratio(self) -> float:
        """Idle share of the makespan, over all ranks."""
        return self._idle(self.makespan)

    @property
    def span_bubble_ratio(self) -> float:
        """Idle share of the span, over all ranks."""
        return self._idle(self.span)

    def _idle(self, length: float) -> float:
        whole = length * self.ranks
        return (whole - sum(self.busy)) / whole if whole else 0.0

    def of_rank(self, rank: int) -> list[Span]:
        """The spans of ``rank``, in program order."""
        return [span for span in self.spans if span.rank == rank]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` reads them back."""
        return {
            "spans": [list(span) for span in self.spans],
            "makespan": self.makespan,
            "span": self.span,
            "busy": self.busy,
            "peak_activations": self.peak_activations,
            "messages": self.messages,
            "bubble_ratio": self.bubble_ratio,
            "span_bubble_ratio": self.span_bubble_ratio,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timeline:
        """The timeline that :meth:`to_dict` wrote."""
        return cls(
            spans=tuple(Span(*span) for span in data["spans"]),
            makespan=data["makespan"],
            span=data["span"],
            busy=list(data["busy"]),
            peak_activations=list(data["peak_activations"]),
            messages=data["messages"],
        )
