"""Rates reached against bytes moved: under the least time of a launch, and under the rate of a copy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipekern.cli.bench.machine import Rates
from pipekern.cli.bench.row import Row
from pipekern.trace import figure

_COLOURS = (figure.BLUE, figure.ORANGE, figure.GREEN, figure.VERMILLION, figure.PURPLE, figure.SKY)
_MARKERS = {"eager": "o", "compiled": "s", "graph": "^"}


def draw(rows: Sequence[Row], rates: Rates, path: Path, title: str) -> None:
    """A point a row that is bound by memory: colour by contender, marker by mode."""
    points = [row for row in rows if row.pct_of_copy is not None and row.gpu_us and row.bytes_floor]
    picture = figure.new_figure(9, 6)
    axes = picture.add_subplot()
    contenders = sorted({row.contender for row in points}, key=lambda name: (name != "pipekern", name))
    for contender, colour in zip(contenders, _COLOURS, strict=False):
        for mode, marker in _MARKERS.items():
            own = [row for row in points if (row.contender, row.mode) == (contender, mode)]
            x = [row.bytes_floor or 0 for row in own]
            y = [(row.bytes_floor or 0) / (row.gpu_us or 1) / 1e3 for row in own]
            label = contender if mode == "eager" else None
            axes.scatter(x, y, s=26, color=colour, marker=marker, label=label, alpha=0.8, linewidths=0)
    sizes = [2.0**i for i in range(12, 36)]
    roof = [min(size / rates.least / 1e3, rates.copy / 1e9) for size in sizes]
    axes.plot(
        sizes, roof, color=figure.GREY, label=f"launch of {rates.least:.3g} µs, copy at {rates.copy / 1e9:.4g} GB/s"
    )
    axes.set(
        xscale="log", yscale="log", xlabel="fewest bytes that must move", ylabel="GB/s of those bytes", title=title
    )
    axes.legend(frameon=False, title="circle eager, square compiled, triangle graph")
    axes.spines[["top", "right"]].set_visible(False)
    figure.save(picture, path)
