from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pipekern.schedule import Action, Costs, Schedule, build, describe, explore, names, registry
from tests.schedule.javascript import GOOD, exact, facts, in_chromium, needs_chromium, with_script


def test_golden_one_file_that_asks_for_nothing() -> None:
    html = explore.page()
    assert html.startswith("<!doctype html>") and html.rstrip().endswith("</html>")
    assert "default-src 'none'" in html
    assert not re.search(
        r"https?://(?!www\.w3\.org/2000/svg\";)|@import|\bfetch\(|XMLHttpRequest|<link[^>]+href=\"(?!data:)|\bsrc=|\{\{",
        html,
    )
    assert set(facts()) == set(names())
    assert facts()["zb-v"]["about"].startswith("ZB-V: two chunks a rank in V placement")
    assert facts()["hanayo"]["chunks"] == {"least": 2, "most": 65534, "step": 2}


def test_every_file_of_the_page_is_in_it() -> None:
    held = {path.name for path in files("pipekern.schedule").joinpath("page").iterdir()}
    assert held == {*explore.SCRIPTS, "page.html", "page.css"}
    for name in held - {"page.html"}:
        assert explore.source(name).strip() in explore.page(), name


def test_every_schedule_has_a_rule() -> None:
    for name in names():
        assert re.search(rf'^  "?{re.escape(name)}"?: \(grid\) =>', explore.source("rules.js"), re.MULTILINE), name


def test_given_schedules_cannot_break_the_page() -> None:
    schedule = build("1f1b", ranks=2, microbatches=2)
    html = explore.page([Schedule.parse(str(schedule).replace("name=1f1b", "name=</script><b>"))])
    assert "</script><b>" not in html and r"\u003c/script>\u003cb>" in html


def test_a_registered_schedule_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    registry.register("mine")(lambda grid: [[Action("F", 0, 0)]])
    assert "mine" in names() and "mine" not in facts()


@needs_chromium
def test_page_opens_where_the_link_points(tmp_path: Path) -> None:
    file = tmp_path / "explore.html"
    file.write_text(explore.page(), encoding="utf-8")
    link = "#schedule=zb-h2&p=6&m=15&F=18.522&B=18.086&W=9.337&c=0.601&kept=0.75"
    page = in_chromium(file, link)
    assert page.console == []
    timeline = build("zb-h2", ranks=6, microbatches=15).simulate(
        exact({"forward": 18.522, "backward": 18.086, "weight": 9.337, "comm": 0.601, "kept": 0.75})
    )
    numbers = json.loads(page.text("numbers"))
    assert (numbers["schedule"], numbers["ranks"], numbers["microbatches"]) == ("zb-h2", 6, 15)
    assert (numbers["makespan"], numbers["span"]) == (timeline.makespan, timeline.span)
    assert (numbers["busy"], numbers["peak_activations"]) == (timeline.busy, timeline.peak_activations)
    assert f"<dd>{timeline.bubble_ratio:.1%}".replace("%", " %") in page.dom.replace("\u00a0", " ")
    command = "pipekern schedule simulate zb-h2 --ranks 6 --microbatches 15 --forward 18.522 --backward 18.086"
    assert page.text("command") == f"{command} --weight 9.337 --comm 0.601 --kept 0.75"
    assert page.dom.count("<tr") == 1 + len(names()) + 1 + 6  # all schedules, and every rank


DRIVE = """
console.warn("the console is watched");
const figures = () => JSON.parse($("numbers").textContent);
const drag = (key, value) => {
  const slider = document.querySelector(`[data-key="${key}"] input`);
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
  return figures();
};
const type = (key, value) => {
  const box = document.querySelectorAll(`[data-key="${key}"] input`)[1];
  box.value = value;
  box.dispatchEvent(new Event("input"));
  return figures();
};
const select = (name) => {
  $("schedule").value = name;
  $("schedule").dispatchEvent(new Event("change"));
  return figures();
};
const key = (name) => {
  $("picture").dispatchEvent(new KeyboardEvent("keydown", { key: name }));
  return $("status").textContent;
};
const pixel = (x, y) => {
  const dense = $("canvas").width / $("canvas").clientWidth;
  const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  pen.drawImage($("canvas"), x * dense, y * dense, 1, 1, 0, 0, 1, 1);
  return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
"""

CONTROLS = (
    DRIVE
    + """
const seen = { start: figures() };
seen.colours = [pixel(GUTTER + 3, 4), pixel(GUTTER + 3, picture.row + 6)];
seen.ranks = drag("p", 6);
seen.microbatches = drag("m", 20);
seen.forward = type("F", "2.25");
seen.latency = drag("c", 0.5);
seen.split = select("zb-h1");
seen.kept = type("kept", "0.5");
seen.shown = $("figures").textContent;
seen.hash = location.hash;
seen.again = JSON.stringify(fromHash(location.hash)) === JSON.stringify(state);
seen.chunks = [select("hanayo"), type("v", "4")];
seen.snapped = [select("dualpipe"), drag("p", 5), $("notes").textContent];
seen.pair = [type("pair", "3"), type("pair", "")];
seen.keys = ["ArrowRight", "ArrowRight", "ArrowDown", "Escape"].map(key);
key("+");
seen.zoomed = [$("zoom-value").textContent, $("picture").scrollWidth > $("picture").clientWidth];
seen.limited = [type("limit", "2"), $("figures").querySelector(".over dd").textContent];
select("own");
seen.empty = [$("fault").textContent, $("fault").hidden];
$("text").value = "GOOD";
$("text").dispatchEvent(new Event("input"));
seen.own = [figures(), $("fault").hidden];
seen.given = change({ text: "GOOD".replace("0F0 0BW0", "0BW0 0F0") }) ?? $("fault").textContent;
seen.garbage = fromHash("#schedule=toString&p=abc&m=-5&F=1e99&constructor=1&limit=&v=3.6&B=%");
seen.requests = performance.getEntriesByType("resource").map(({ name }) => name);
return seen;
""".replace("GOOD", GOOD.replace("\n", "\\n"))
)


def figures_of(name: str, ranks: int, microbatches: int, costs: Costs, chunks: int | None = None) -> dict[str, Any]:
    timeline = build(name, ranks=ranks, microbatches=microbatches, chunks=chunks).simulate(costs)
    return {"makespan": timeline.makespan, "span": timeline.span, "peak_activations": timeline.peak_activations}


@needs_chromium
def test_controls_change_the_figures(tmp_path: Path) -> None:
    file = tmp_path / "driven.html"
    file.write_text(with_script(CONTROLS), encoding="utf-8")
    page = in_chromium(file)
    assert len(page.console) == 1 and "the console is watched" in page.console[0]
    seen = json.loads(page.text("outcome"))
    assert seen["start"].items() >= figures_of("1f1b", 4, 8, Costs(1, 1, 1)).items()
    assert seen["ranks"].items() >= figures_of("1f1b", 6, 8, Costs(1, 1, 1)).items()
    assert seen["microbatches"].items() >= figures_of("1f1b", 6, 20, Costs(1, 1, 1)).items()
    assert seen["forward"].items() >= figures_of("1f1b", 6, 20, Costs(2.25, 1, 1)).items()
    assert seen["latency"].items() >= figures_of("1f1b", 6, 20, Costs(2.25, 1, 1, comm=0.5)).items()
    assert seen["split"].items() >= figures_of("zb-h1", 6, 20, Costs(2.25, 1, 1, comm=0.5)).items()
    costs = Costs(2.25, 1, 1, comm=0.5, kept=0.5)
    assert seen["kept"].items() >= figures_of("zb-h1", 6, 20, costs).items()
    assert f"{seen['kept']['makespan']:g} µs" in seen["shown"]
    assert seen["hash"] == "#schedule=zb-h1&p=6&m=20&v=2&F=2.25&B=1&W=1&c=0.5&kept=0.5" and seen["again"]
    assert seen["chunks"][0].items() >= figures_of("hanayo", 6, 20, costs, 2).items()
    assert seen["chunks"][1].items() >= figures_of("hanayo", 6, 20, costs, 4).items()
    assert seen["snapped"][1].items() >= {"ranks": 6, **figures_of("dualpipe", 6, 20, costs)}.items()
    assert seen["snapped"][2] == "ranks 6 shown: dualpipe takes an even number of ranks"
    overlapped = Costs(2.25, 1, 1, comm=0.5, kept=0.5, pair=3)
    assert seen["pair"][0].items() >= figures_of("dualpipe", 6, 20, overlapped).items()
    assert seen["pair"][1] == seen["snapped"][1]
    assert seen["requests"] == []


@needs_chromium
def test_picture_keys_and_a_schedule_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "driven.html"
    file.write_text(with_script(CONTROLS), encoding="utf-8")
    seen = json.loads(in_chromium(file).text("outcome"))
    assert seen["colours"] == [[0x00, 0x72, 0xB2], [0xEC, 0xEE, 0xF1]]  # F0 on rank 0, idle on rank 1
    assert seen["keys"] == [
        "rank 0: F forward of micro-batch 0 on stage 0, from 0 to 2.25 µs",
        "rank 0: F forward of micro-batch 1 on stage 0, from 2.25 to 4.5 µs",
        "rank 1: F forward of micro-batch 0 on stage 1, from 2.75 to 5 µs",
        "",
    ]
    assert seen["zoomed"] == ["1.5×", True]
    garbage = {"schedule": "1f1b", "p": 4, "m": 1, "v": 4, "F": 1e7, "B": 1, "limit": None, "text": ""}
    assert garbage.items() <= seen["garbage"].items() and len(seen["garbage"]) == 12
    assert seen["limited"][1] == "7 activations"
    assert seen["empty"] == ["Paste a schedule in the text form, or open a file.", False]
    assert seen["own"][1] and seen["own"][0]["schedule"] == "x"
    assert seen["given"] == (
        "schedule deadlocks: rank 0 stuck at 0BW0 (instruction 0): waits for 0F0; "
        "rank 1 stuck at 1F0 (instruction 0): waits for 0F0"
    )


GRID = """
const cases = CASES;
return cases.map(({ schedule, p, m, v, F, B, W, c, kept }) => {
  change({ schedule, p, m, v, F, B, W, c, kept });
  return JSON.parse($("numbers").textContent);
});
"""


@needs_chromium
def test_every_schedule_in_the_browser(tmp_path: Path) -> None:
    random = Random()
    cases: list[dict[str, Any]] = []
    for name in names():
        for p, m in ((4, 8), (2 * random.randint(1, 8), 2 * random.randint(1, 32))):
            costs = {"F": random.randrange(5000) / 1000, "B": 1, "W": random.randrange(4000) / 1000}
            sizes = {"schedule": name, "p": p, "m": m, "v": random.choice((2, 4))}
            cases.append(sizes | costs | {"c": random.choice((0, 0.25)), "kept": random.choice((1, 0.6))})
    file = tmp_path / "grid.html"
    file.write_text(with_script(GRID.replace("CASES", json.dumps(cases))), encoding="utf-8")
    page = in_chromium(file)
    assert page.console == []
    for one, numbers in zip(cases, json.loads(page.text("outcome")), strict=True):
        takes = len(describe(one["schedule"]).chunks) > 1
        schedule = build(
            one["schedule"],
            ranks=numbers["ranks"],
            microbatches=numbers["microbatches"],
            chunks=numbers["chunks"] if takes else None,
        )
        costs = {"forward": one["F"], "backward": one["B"], "weight": one["W"], "comm": one["c"], "kept": one["kept"]}
        timeline = schedule.simulate(exact(costs))
        found = (numbers["makespan"], numbers["span"], numbers["peak_activations"], numbers["messages"])
        assert found == (timeline.makespan, timeline.span, timeline.peak_activations, timeline.messages), one
        assert numbers["bubble"] == pytest.approx(timeline.bubble_ratio, abs=1e-12), one
