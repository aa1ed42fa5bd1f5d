"""The explore page: schedules in a browser, redrawn while sizes and costs are dragged.

One HTML file that needs no network and no server. The rules of the schedules and the simulation are there in
JavaScript, in ``page/``: ``rules.js`` and ``fill.js`` are the twins of the generators, ``simulate.js`` of the
simulator, ``text.js`` of the text form; ``state.js`` holds what is chosen, ``picture.js`` draws, ``tables.js`` and
``page.js`` are what stands around it. What a schedule is (its chunks, placement, whether it can be run) is taken from
the registry.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from pipekern._version import __version__
from pipekern.schedule.ir import Schedule
from pipekern.schedule.registry import describe, names

SCRIPTS = ("rules.js", "fill.js", "simulate.js", "text.js", "state.js", "picture.js", "tables.js", "page.js")


def page(schedules: Sequence[Schedule] = ()) -> str:
    """The page's HTML. ``schedules`` are offered beside the published ones, each at its own sizes.

    A schedule that was registered by a user has no rule in the page: build it and give it here.
    """
    published = (name for name in names() if describe(name).generate.__module__.startswith("pipekern.schedule."))
    data = {"schedules": {name: _facts(name) for name in published}, "texts": list(map(str, schedules))}
    parts = {
        "version": __version__,
        "style": source("page.css").rstrip(),
        "data": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),  # nothing in it can end the element
        "script": "\n".join(map(source, SCRIPTS)).rstrip(),
    }
    html = source("page.html")
    for name, text in parts.items():
        html = html.replace("{{" + name + "}}", text, 1)
    return html


def source(name: str) -> str:
    """The text of a file of the page."""
    return files("pipekern.schedule").joinpath("page").joinpath(name).read_text(encoding="utf-8")


def _facts(name: str) -> dict[str, Any]:
    entry = describe(name)
    about = (sys.modules[entry.generate.__module__].__doc__ or "").strip().split("\n\n")[0]
    return {
        "about": " ".join(about.split()),
        "chunks": {"least": entry.chunks[0], "most": entry.chunks[-1], "step": entry.chunks.step},
        "placement": entry.placement.__name__,
        "chains": entry.chains,
        "sliced": entry.sliced,
        "synchronous": entry.synchronous,
        "duplicates_weights": entry.duplicates_weights,
        "runnable": entry.runnable,
    }
