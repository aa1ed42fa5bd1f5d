"""A timeline as a picture (PNG, SVG, PDF): a row a rank, time to the right.

Each kind has its colour, and what is wide enough its hatching, its letter and its micro-batch. A rank's later chunks
are paler. A forward and the backward that it overlaps share the row's height.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipekern.trace.figure import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    YELLOW,
    check_format,
    new_figure,
    rank_rows,
    row_height,
    save,
    time_unit,
)
from pipekern.trace.timeline import COLLECTIVES, Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch


class _Look(NamedTuple):
    label: str
    colour: str
    hatch: str
    ink: str


_LOOKS = {
    "F": _Look("F forward", BLUE, "", "white"),
    "B": _Look("B input gradient", ORANGE, "//", "black"),
    "W": _Look("W weight gradient", GREEN, "..", "black"),
    "BW": _Look("BW whole backward", YELLOW, "\\\\", "black"),
    "RECV": _Look("wait to receive", "#DDDDDD", "xxx", ""),
    "SEND": _Look("wait to send", PURPLE, "ooo", ""),
    "JOIN": _Look("wait for values", "#BBBBBB", "+++", ""),
    "GATHER": _Look("gather values", "#56B4E9", "", ""),
    "REDUCE": _Look("sum gradients", "#882255", "", ""),
    "AWAY": _Look("put away", "#BBBBBB", "--", ""),
    "BACK": _Look("bring back", "#999999", "||", ""),
}


_WITHOUT_NAME = 55  # of these in a row, two characters do not fit
_NARROW = 220  # of these in a row, edges and hatching would hide the colours


class _Bar(NamedTuple):
    """A span with its place: how many stages of its rank come before its own, and its part of the row's height."""

    span: Span
    chunk: int
    top: float
    height: float


def draw(timeline: Timeline, path: str | Path, title: str = "") -> None:
    """Write the picture to ``path``, in the format that its suffix names.

    Idle time is blank. Raises ``ConfigError`` for an unknown suffix, and where matplotlib is missing.
    """
    path = check_format(path)
    figure = new_figure(12, 1.5 + row_height(timeline.ranks) * timeline.ranks)
    axes = figure.add_subplot()
    paint(axes, timeline)
    axes.set_xlabel(time_unit(timeline.makespan)[1])
    axes.set_title(f"{title}   bubble {timeline.bubble_ratio:.1%}".strip(), loc="left", fontsize=10)
    figure.legend(
        handles=(patches := legend(timeline)),
        loc="outside lower center",
        ncols=len(patches),
        frameon=False,
        fontsize=8,
    )
    save(figure, path)


def paint(axes: Axes, timeline: Timeline) -> None:
    """The bars, their labels and the rows' names; the time axis is in the unit of ``time_unit``."""
    bars = list(_bars(timeline))
    _fill(axes, timeline, bars)
    _label(axes, timeline, bars)
    rank_rows(axes, timeline.ranks)
    axes.set_xlim(0, timeline.makespan / time_unit(timeline.makespan)[0] or 1)


def legend(timeline: Timeline) -> list[Patch]:
    """A patch for every kind that there is, and one for idle time."""
    from matplotlib.patches import Patch

    present = {span.op for span in timeline.spans}
    patches = [Patch(label=look.label, **_style(op, 0, True)) for op, look in _LOOKS.items() if op in present]
    return [*patches, Patch(label="idle", facecolor="white", edgecolor="#00000066", linewidth=0.4)]


def _bars(timeline: Timeline) -> Iterator[_Bar]:
    held: dict[int, list[int]] = {rank: [] for rank in range(timeline.ranks)}
    for rank, stage in sorted({(span.rank, span.stage) for span in timeline.spans}):
        held[rank].append(stage)
    places = {id(part): half for pair in _pairs(timeline) for part, half in zip(pair, (-0.4, 0.0), strict=True)}
    for span in timeline.spans:
        if span.op in COLLECTIVES:
            yield _Bar(span, 0, 0.41, 0.08)
        elif span.end > span.start:
            top = places.get(id(span))
            chunk = held[span.rank].index(span.stage)
            yield _Bar(span, chunk, -0.4, 0.8) if top is None else _Bar(span, chunk, top, 0.4)


def _pairs(timeline: Timeline) -> Iterator[tuple[Span, Span]]:
    """Each forward that overlaps the backward after it."""
    for one, after in zip(timeline.spans, timeline.spans[1:], strict=False):
        if (one.rank, one.start, one.end) == (after.rank, after.start, after.end) and one.end > one.start:
            yield one, after


def _fill(axes: Axes, timeline: Timeline, bars: list[_Bar]) -> None:
    unit, _ = time_unit(timeline.makespan)
    groups: dict[tuple[str, int, int, bool, float, float], list[tuple[float, float]]] = {}
    for (rank, op, _, _, start, end), chunk, top, height in bars:
        wide = end - start >= timeline.makespan / _NARROW
        groups.setdefault((op, rank, chunk, wide, top, height), []).append((start / unit, (end - start) / unit))
    for (op, rank, chunk, wide, top, height), row in groups.items():
        axes.broken_barh(row, (rank + top, height), **_style(op, chunk, wide))


def _colour(op: str, chunk: int) -> str:
    """The kind's colour, a quarter nearer to white with every earlier chunk of the rank."""
    part = min(0.25 * chunk, 0.6)
    parts = [int(_LOOKS[op].colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(value + (255 - value) * part):02X}" for value in parts)


def _style(op: str, chunk: int, wide: bool) -> dict[str, Any]:
    look = _LOOKS[op]
    if not wide:
        return {"facecolor": _colour(op, chunk), "linewidth": 0}
    edge = "white" if look.ink == "white" else "#4A4A4A"
    return {"facecolor": _colour(op, chunk), "hatch": look.hatch, "edgecolor": edge, "linewidth": 0.5}


def _label(axes: Axes, timeline: Timeline, bars: list[_Bar]) -> None:
    unit, _ = time_unit(timeline.makespan)
    shortest = timeline.makespan / _WITHOUT_NAME
    for span, chunk, top, height in bars:
        look = _LOOKS[span.op]
        if look.ink and span.end - span.start >= shortest:
            ink = "black" if chunk else look.ink
            box = (
                None if look.ink == "white" else {"facecolor": _colour(span.op, chunk), "edgecolor": "none", "pad": 0.6}
            )
            place = ((span.start + span.end) / 2 / unit, span.rank + top + height / 2)
            axes.text(
                *place, _name(span), color=ink, ha="center", va="center", fontsize=7 if height > 0.5 else 6, bbox=box
            )


def _name(span: Span) -> str:
    return f"{span.op[0]}{span.microbatch}"
