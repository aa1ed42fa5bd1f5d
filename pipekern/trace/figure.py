"""What all pictures share: the formats, a matplotlib figure, the time axis. matplotlib is loaded at the first picture.

Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipekern.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, LINE = "#666666", "#D4D9DF"


def check_format(path: str | Path) -> Path:
    """``path``; raises ``ConfigError`` where its suffix names no picture."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path.name!r} is no picture; let its name end in {', '.join(FORMATS)}")
    return path


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches; raises ``ConfigError`` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib; pip install 'pipekern[plot]'") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write the figure. An SVG is the same, byte for byte, each time: it has no date and no random identifiers."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "pipekern"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def time_unit(makespan: float) -> tuple[float, str]:
    """Microseconds a unit of the time axis, and the unit's name."""
    return (1e6, "s") if makespan >= 1e7 else (1e3, "ms") if makespan >= 1e4 else (1.0, "µs")


def row_height(ranks: int) -> float:
    """Inches a rank's row: less where there are many."""
    return min(0.42, max(0.24, 4.2 / max(ranks, 1)))


def rank_rows(axes: Axes, ranks: int) -> None:
    """A row a rank, the first at the top, without a frame."""
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], fontsize=10 if ranks <= 10 else 8)
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
