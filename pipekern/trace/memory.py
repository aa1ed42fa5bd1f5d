"""What every rank holds over time, as curves and as a picture below the timeline (PNG, SVG, PDF)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from pipekern.trace import gantt
from pipekern.trace.figure import (
    GREY,
    LINE,
    SKY,
    VERMILLION,
    check_format,
    new_figure,
    rank_rows,
    row_height,
    save,
    time_unit,
)
from pipekern.trace.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = list[tuple[float, float]]
_HIGH = 0.84  # part of a row's height that the highest curve takes


def curves(timeline: Timeline, shares: Sequence[float | Fraction], kept: float = 1.0) -> list[Curve]:
    """For every rank of a simulated timeline, the points (time in µs, held from then on), by time.

    ``shares[s]`` is what one micro-batch (or slice) on stage ``s`` holds, in activations of one micro-batch through
    the rank's whole share. It counts whole from the start of its F to the end of its B, and ``kept`` of it to the end
    of its W; from AWAY to BACK it does not. The highest point of a curve is the rank's ``peak_activations``.
    """
    stays = Fraction(kept)
    change = {
        "F": Fraction(1),
        "B": stays - 1,
        "W": -stays,
        "BW": Fraction(-1),
        "AWAY": Fraction(-1),
        "BACK": Fraction(1),
    }
    held = [Fraction(0)] * timeline.ranks
    found: list[Curve] = [[] for _ in held]
    for span in timeline.spans:
        if span.op in change:
            held[span.rank] += Fraction(shares[span.stage]) * change[span.op]
            found[span.rank].append((span.start if span.op in ("F", "BACK") else span.end, float(held[span.rank])))
    return found


def draw(
    timeline: Timeline, held: Sequence[Curve], path: str | Path, title: str = "", limit: float | None = None
) -> None:
    """Write the timeline and below it the curves ``held``, on one time axis, to ``path``.

    ``limit`` is drawn as a dashed line in every row, and what is above it stands out. Raises ``ConfigError`` for an
    unknown suffix, and where matplotlib is missing.
    """
    path = check_format(path)
    figure = new_figure(12, 2.1 + 2 * row_height(timeline.ranks) * timeline.ranks)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1])
    gantt.paint(upper, timeline)
    upper.tick_params(axis="x", length=0)
    upper.spines["bottom"].set_visible(False)
    upper.set_title(f"{title}   bubble {timeline.bubble_ratio:.1%}".strip(), loc="left", fontsize=10)
    paint(lower, held, timeline.makespan, limit)
    lower.set_xlabel(time_unit(timeline.makespan)[1])
    most = f"memory, in activations of one micro-batch{'' if limit is None else f'; limit {limit:g}'}"
    lower.set_title(most, loc="left", fontsize=9, color=GREY)
    patches = gantt.legend(timeline)
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8)
    save(figure, path)


def paint(axes: Axes, held: Sequence[Curve], makespan: float, limit: float | None) -> None:
    """A row a rank, all to one scale, each with its peak at the right end."""
    unit, _ = time_unit(makespan)
    peaks = [max((value for _, value in curve), default=0.0) for curve in held]
    scale = _HIGH / (max(*peaks, limit or 0.0, 0.0) or 1.0)
    for rank, curve in enumerate(held):
        times = [0.0, *(time / unit for time, _ in curve), makespan / unit]
        values = [0.0, *(value for _, value in curve), curve[-1][1] if curve else 0.0]
        floor = rank + _HIGH / 2
        axes.axhline(floor, color=LINE, linewidth=0.6, zorder=0)
        _area(axes, times, [0.0] * len(values), values, floor, scale, SKY)
        if limit is not None:
            _area(axes, times, [min(limit, value) for value in values], values, floor, scale, VERMILLION)
            axes.axhline(floor - limit * scale, color=VERMILLION, linewidth=0.9, linestyle=(0, (5, 3)))
        over = limit is not None and peaks[rank] > limit
        place = axes.get_yaxis_transform()
        ink = VERMILLION if over else GREY
        axes.text(1.004, rank, f"peak {peaks[rank]:.4g}", transform=place, color=ink, va="center", fontsize=8)
    rank_rows(axes, len(held))
    axes.set_xlim(0, makespan / unit or 1)


def _area(
    axes: Axes, times: list[float], low: list[float], high: list[float], floor: float, scale: float, colour: str
) -> None:
    """Steps between two curves; rows grow downwards, so higher is less."""
    below, above = ([floor - value * scale for value in values] for values in (low, high))
    axes.fill_between(times, below, above, step="post", color=colour, linewidth=0)
