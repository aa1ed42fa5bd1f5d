"""Schedules beside each other as a picture (PNG, SVG, PDF): idle time against memory; the lower left corner is best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pipekern.trace.figure import BLUE, GREY, LINE, ORANGE, VERMILLION, check_format, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox


class Point(NamedTuple):
    """A schedule's place: ``memory`` in activations of one micro-batch, ``bubble`` as a share of the time."""

    name: str
    memory: float
    bubble: float
    runnable: bool = True
    duplicates_weights: bool = False


class _Look(NamedTuple):
    label: str
    marker: str
    filled: bool


_LOOKS = {
    (True, False): _Look("can train today", "o", True),
    (False, False): _Look("simulated only", "o", False),
    (False, True): _Look("simulated only, weights kept twice", "s", False),
    (True, True): _Look("can train today, weights kept twice", "s", True),
}
# Where a name may stand, in points from its dot: the first place that is free is taken.
_SIDES = [(9, 0), (-9, 0)]
_RINGS = [(x, up * 12 * ring) for ring in range(1, 8) for x in (0, 9, -9) for up in (1, -1)]
_NEAR = 15  # a name that is farther away gets a line to its dot
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 0.8}
_TEXT: dict[str, Any] = {
    "textcoords": "offset points",
    "va": "center",
    "fontsize": 8,
    "color": GREY,
    "zorder": 5,
    "bbox": _PAPER,
}


def draw(
    points: Sequence[Point],
    path: str | Path,
    title: str = "",
    *,
    found: Sequence[tuple[float, float]] = (),
    limit: float | None = None,
    axis: str = "bubble",
) -> None:
    """Write the picture to ``path``. ``found`` are (memory, bubble) of the best schedule that a search found under each
    cap, drawn as the border that they form; ``limit`` is a dashed line; ``axis`` says what the bubble is a share of.

    Raises ``ConfigError`` for an unknown suffix, and where matplotlib is missing.
    """
    path = check_format(path)
    figure = new_figure(8.6, 5.6)
    axes = figure.add_subplot()
    if found:
        _border(axes, sorted(found))
    if limit is not None:
        axes.axvline(limit, color=VERMILLION, linewidth=1, linestyle=(0, (5, 3)), label=f"limit {limit:g}", zorder=1)
    for (runnable, twice), (label, marker, filled) in _LOOKS.items():
        group = [p for p in points if (p.runnable, p.duplicates_weights) == (runnable, twice)]
        if group:
            x, y = [p.memory for p in group], [100 * p.bubble for p in group]
            size, above = (96, 3) if twice else (46, 4)  # a round dot on a square one leaves both visible
            face = BLUE if filled else "white"
            axes.scatter(x, y, size, face, marker=marker, edgecolors=BLUE, linewidths=1.6, label=label, zorder=above)
    _frame(axes, title, axis)
    if found and points:
        axes.set_ylim(top=130 * max(point.bubble for point in points) or 1)
    _names(axes, points, found)
    save(figure, path)


def _border(axes: Axes, found: Sequence[tuple[float, float]]) -> None:
    x, y = [memory for memory, _ in found], [100 * bubble for _, bubble in found]
    axes.step(
        x,
        y,
        where="post",
        color=ORANGE,
        linewidth=2,
        marker="D",
        markersize=4,
        label="best that search finds",
        zorder=2,
    )


def _frame(axes: Axes, title: str, axis: str) -> None:
    axes.margins(0.1)
    axes.autoscale_view()
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("peak memory of the fullest rank, in activations of one micro-batch")
    axes.set_ylabel(f"{axis}, %")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.13), ncols=5, frameon=False, fontsize=8, columnspacing=1.2)


def _names(axes: Axes, points: Iterable[Point], found: Sequence[tuple[float, float]]) -> None:
    """Each dot's names beside it, where they cover neither a dot nor other names as far as there is room."""
    shared: dict[tuple[float, float], list[str]] = {}
    for point in points:
        shared.setdefault((point.memory, round(100 * point.bubble, 6)), []).append(point.name)
    axes.figure.canvas.draw()  # places depend on the final layout
    dots = [axes.transData.transform(place) for place in (*shared, *((x, 100 * y) for x, y in found))]
    taken = [_square(x, y) for x, y in dots]
    for place, names in sorted(shared.items()):
        taken.append(_place(axes, place, ", ".join(names), taken))


def _square(x: float, y: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - 7, y - 7, x + 7, y + 7)


def _place(axes: Axes, place: tuple[float, float], name: str, taken: list[Bbox]) -> Bbox:
    """Write ``name`` at the first place that is free, or where there is none at the first; returns what it takes."""
    for x, y in (*_SIDES, *_RINGS):
        text = axes.annotate(name, place, (x, y), ha=_align(x), **_TEXT)
        box = text.get_window_extent()
        inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
        if inside and not any(box.overlaps(other) for other in taken):
            if abs(y) > _NEAR:
                line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5}
                axes.annotate("", place, (x, y), textcoords="offset points", arrowprops=line, zorder=2)
            return box
        text.remove()
    return axes.annotate(name, place, _SIDES[0], ha=_align(_SIDES[0][0]), **_TEXT).get_window_extent()


def _align(x: float) -> Literal["left", "center", "right"]:
    return "left" if x > 0 else "right" if x < 0 else "center"
