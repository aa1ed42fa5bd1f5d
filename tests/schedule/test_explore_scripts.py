from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from pipekern.errors import ConfigError, ScheduleError
from pipekern.schedule import Costs, Schedule, build, describe, names
from tests.schedule.javascript import GOOD, exact, facts, in_node, needs_node
from tests.schedule.sample import random_schedule

Case = dict[str, Any]
KEYS = ("forward", "backward", "weight", "comm", "pair", "kept")


def case(name: str, ranks: int, microbatches: int, chunks: int, memory: float | None = None, **costs: float) -> Case:
    grid = {"ranks": ranks, "microbatches": microbatches, "chunks": chunks, "memory": memory}
    given = {"forward": 1, "backward": 1, "weight": 1, "comm": 0, "pair": None, "kept": 1} | costs
    return {"name": name, "grid": grid, "facts": facts()[name], "costs": given}


def random_costs(random: Random) -> dict[str, Any]:
    """Decimals of at most three places, which the page takes."""
    costs: dict[str, Any] = {key: random.choice([0, 1, 2.5, random.randrange(20_000_000) / 1000]) for key in KEYS[:4]}
    pair = random.choice([None, random.randrange(9000) / 1000])
    return costs | {"pair": pair, "kept": random.choice([0, 1, 0.5, random.randrange(1000) / 1000])}


def expected(schedule: Schedule, costs: dict[str, Any]) -> dict[str, Any]:
    timeline = schedule.simulate(exact(costs))
    return {
        "makespan": timeline.makespan,
        "span": timeline.span,
        "busy": timeline.busy,
        "peaks": timeline.peak_activations,
        "messages": timeline.messages,
        "bubble": pytest.approx(timeline.bubble_ratio, abs=1e-12),
        "spanBubble": pytest.approx(timeline.span_bubble_ratio, abs=1e-12),
    }


RUN = """
return given.map(({ name, grid, facts, costs }) => {
  grid.memory ??= Infinity;
  const { notes } = nearest(name, grid, facts);
  if (notes.length) return { refused: notes };
  const schedule = build(name, grid, facts);
  const { makespan, span, busy, peaks, messages, bubble, spanBubble } = simulate(schedule, costs);
  return { text: textOf(schedule), figures: { makespan, span, busy, peaks, messages, bubble, spanBubble } };
});
"""


def assert_equal(cases: list[Case], folder: Path) -> None:
    """The page's rules and simulator give what Python's give, or refuse where they refuse."""
    for one, found in zip(cases, in_node(RUN, cases, folder), strict=True):
        try:
            schedule = build(one["name"], **one["grid"])
        except ConfigError as error:
            note = found["refused"][0]
            assert f"nearest {note['what']}={note['value']}" in str(error), one
        else:
            assert found.get("text") == str(schedule), one
            assert found["figures"] == expected(schedule, one["costs"]), one


@needs_node
def test_rules_equal_the_generators(tmp_path: Path) -> None:
    cases = [
        case(name, ranks, microbatches, chunks)
        for name in names()
        for ranks in (1, 2, 3, 4, 6)
        for microbatches in (1, 2, 4, 5, 8, 12)
        for chunks in {2, 3, 4} & set(describe(name).chunks) or {describe(name).chunks[0]}
    ]
    capped = [
        case(name, 4, 9, describe(name).chunks[0], cap) for name in ("zb-h2", "hanayo") for cap in (0.5, 1, 5, 6.5)
    ]
    assert_equal(cases + capped, tmp_path)


@needs_node
def test_figures_equal_the_simulator_under_random_costs(tmp_path: Path) -> None:
    random = Random()
    cases = []
    for name in names():
        for _ in range(4):
            chunks = random.choice(describe(name).chunks[:3])
            sizes = (2 * random.randint(1, 4), 2 * random.randint(1, 12))
            cases.append(case(name, *sizes, chunks, **random_costs(random)))
    assert_equal(cases, tmp_path)


@pytest.mark.full
@needs_node
@pytest.mark.parametrize("name", names())
def test_whole_grid(tmp_path: Path, name: str) -> None:
    random = Random()
    takes = describe(name).chunks[:3]
    cases = [
        case(name, ranks, microbatches, chunks, **random_costs(random))
        for ranks in range(1, 17)
        for microbatches in (*range(1, 18), 24, 32, 48, 64)
        for chunks in {takes[0], takes[-1]}
    ]
    assert_equal(cases, tmp_path)


@needs_node
def test_text_form_both_ways(tmp_path: Path) -> None:
    random = Random()
    schedules = [random_schedule(random) for _ in range(60)]
    schedules += [build("dualpipe", ranks=4, microbatches=8), build("seq1f1b", ranks=2, microbatches=3)]
    schedules += [build("pipedream-2bw", ranks=2, microbatches=4).forward_only()]
    costs = random_costs(random) | {"pair": None}
    body = """return given.texts.map((text) => {
      const schedule = parse(text);
      const { makespan, span, busy, peaks, messages, bubble, spanBubble } = simulate(schedule, given.costs);
      return { text: textOf(schedule), figures: { makespan, span, busy, peaks, messages, bubble, spanBubble } };
    });"""
    texts = list(map(str, schedules))
    for schedule, found in zip(schedules, in_node(body, {"texts": texts, "costs": costs}, tmp_path), strict=True):
        assert found["text"] == str(schedule)
        if schedule.trains:
            assert found["figures"] == expected(schedule, costs), (str(schedule), costs)


BAD = {
    "hello": "the first line is not",
    GOOD.replace("1F0", "1X0"): "“1X0” is not an action",
    GOOD.replace("1F0", "7F0"): "7F0: there is no such stage or micro-batch",
    GOOD.replace("1F0 ", ""): "1F0 runs 0 times",
    GOOD.replace("0F0", "0F0 0F0"): "0F0 runs 2 times",
    GOOD.replace("0F0", "0F0 1F0"): "rank 0 runs 1F0, but stage 1 is on rank 1",
    GOOD.replace("0BW0", "0B0"): "0W0 runs 0 times",
    GOOD.replace("stage_rank=0,1", "stage_rank=0,1,1 chains=2"): "3 stages and 1 micro-batches are no schedule",
}


@needs_node
def test_faults_of_a_text(tmp_path: Path) -> None:
    body = "return given.map((text) => { try { return parse(text).name; } catch (error) { return error.message; } });"
    for (text, part), found in zip(BAD.items(), in_node(body, list(BAD), tmp_path), strict=True):
        assert part in found, text
    assert in_node(body, [GOOD], tmp_path) == ["x"]


@needs_node
def test_deadlocks_are_told_as_python_tells_them(tmp_path: Path) -> None:
    random = Random()
    schedules: list[Schedule] = []
    while len(schedules) < 40:
        schedule = random_schedule(random)
        rows = [random.sample(row, len(row)) for row in schedule.actions]
        schedules.append(
            Schedule("x", schedule.microbatches, schedule.stage_rank, tuple(map(tuple, rows)), schedule.chains)
        )
    body = """return given.map((text) => {
      try { simulate(parse(text), { forward: 1, backward: 1, weight: 1, comm: 0, pair: null, kept: 1 }); return ""; }
      catch (error) { return error.message; }
    });"""
    found = in_node(body, list(map(str, schedules)), tmp_path)
    for schedule, message in zip(schedules, found, strict=True):
        try:
            schedule.simulate(Costs(1, 1, 1))
        except ScheduleError as error:
            assert message == f"schedule deadlocks: {'; '.join(error.faults)}", str(schedule)
        else:
            assert message == "", str(schedule)
    assert any(found)
