"""A timeline as a picture (PNG, SVG, PDF): a row a rank, time to the right.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; each kind also has its own hatching, and what is
wide enough its letter and micro-batch. A rank's later chunks are paler.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipekern.errors import ConfigError
from pipekern.trace.timeline import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")


class _Look(NamedTuple):
    label: str
    colour: str
    hatch: str
    text: str


_LOOKS = {
    "F": _Look("F forward", "#0072B2", "", "white"),
    "B": _Look("B input gradient", "#E69F00", "//", "black"),
    "W": _Look("W weight gradient", "#009E73", "..", "black"),
    "BW": _Look("BW whole backward", "#F0E442", "\\\\", "black"),
    "RECV": _Look("wait to receive", "#DDDDDD", "xxx", ""),
    "SEND": _Look("wait to send", "#CC79A7", "ooo", ""),
}


def draw(timeline: Timeline, path: str | Path, title: str = "") -> None:
    """Write the picture to ``path``, in the format that its suffix names.

    Idle time is blank. Raises ``ConfigError`` for an unknown suffix, and where matplotlib is missing.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path.name!r} is no picture; let its name end in {', '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib; pip install 'pipekern[plot]'") from error
    figure = Figure(figsize=(12, 1.5 + 0.42 * timeline.ranks), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _bars(axes, timeline)
    _labels(axes, timeline)
    _frame(axes, timeline, title)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _scale(timeline: Timeline) -> tuple[float, str]:
    """Microseconds a unit of the axis, and the unit's name."""
    longest = timeline.makespan
    return (1e6, "s") if longest >= 1e7 else (1e3, "ms") if longest >= 1e4 else (1.0, "µs")


def _bars(axes: Axes, timeline: Timeline) -> None:
    unit, _ = _scale(timeline)
    held: dict[int, list[int]] = {rank: [] for rank in range(timeline.ranks)}
    for rank, stage in sorted({(span.rank, span.stage) for span in timeline.spans}):
        held[rank].append(stage)
    bars: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for span in timeline.spans:
        if span.end > span.start:
            key = (span.op, span.rank, held[span.rank].index(span.stage))
            bars.setdefault(key, []).append((span.start / unit, (span.end - span.start) / unit))
    for (op, rank, chunk), row in bars.items():
        axes.broken_barh(row, (rank - 0.4, 0.8), alpha=max(0.5, 1 - 0.25 * chunk), **_style(_LOOKS[op]))


def _style(look: _Look) -> dict[str, Any]:
    edge = "white" if look.text == "white" else "#4A4A4A"
    return {"facecolor": look.colour, "hatch": look.hatch, "edgecolor": edge, "linewidth": 0.5}


def _labels(axes: Axes, timeline: Timeline) -> None:
    unit, _ = _scale(timeline)
    shortest = timeline.makespan / 55  # narrower than this, two characters do not fit
    for span in timeline.spans:
        look = _LOOKS[span.op]
        if look.text and span.end - span.start >= shortest:
            middle = (span.start + span.end) / 2 / unit
            box = None if look.text == "white" else {"facecolor": look.colour, "edgecolor": "none", "pad": 1.0}
            axes.text(middle, span.rank, _name(span), color=look.text, ha="center", va="center", fontsize=7, bbox=box)


def _name(span: Span) -> str:
    return f"{span.op[0]}{span.microbatch}"


def _frame(axes: Axes, timeline: Timeline, title: str) -> None:
    from matplotlib.patches import Patch

    present = {span.op for span in timeline.spans}
    patches = [Patch(label=look.label, **_style(look)) for op, look in _LOOKS.items() if op in present]
    patches.append(Patch(label="idle", facecolor="white", edgecolor="#00000066", linewidth=0.4))
    axes.figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8)
    axes.set_yticks(range(timeline.ranks), [f"rank {rank}" for rank in range(timeline.ranks)])
    axes.set_ylim(timeline.ranks - 0.5, -0.5)
    axes.set_xlim(0, timeline.makespan / _scale(timeline)[0] or 1)
    axes.set_xlabel(_scale(timeline)[1])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"{title}   bubble {timeline.bubble_ratio:.1%}".strip(), loc="left", fontsize=10)
