"""Spin explores every interleaving of ranks and links: no deadlock, every message matched, every slot given back."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipekern.errors import ConfigError, ScheduleError
from pipekern.schedule import Program, Schedule, build, comms, describe, names
from pipekern.schedule.promela import model

spin = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")),
    reason="needs the model checker spin (Debian: apt install spin) and gcc",
)


def explore(text: str, folder: Path) -> list[str]:
    """What Spin finds wrong with a model, in its own words."""
    (folder / "model.pml").write_text(text)
    subprocess.run(["spin", "-a", "model.pml"], cwd=folder, check=True, stdout=subprocess.PIPE)
    compiler = ["gcc", "-O0", "-w", "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c"]
    subprocess.run(compiler, cwd=folder, check=True)
    run = subprocess.run(["./pan", "-m100000"], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    assert "max search depth too small" not in run.stdout and "out of memory" not in run.stdout
    errors = re.search(r"errors: (\d+)", run.stdout)
    assert errors, run.stdout
    found = re.findall(r"pan:\d+: (.*) \(at depth", run.stdout)
    assert bool(found) == bool(int(errors[1])), run.stdout
    return found


def programs(schedules: list[str], most_ranks: int, most_microbatches: int) -> list[tuple[str, int, int]]:
    """The sizes up to the given ones that a schedule takes."""
    sizes = []
    for name in schedules:
        for ranks in range(2, most_ranks + 1):
            for microbatches in range(1, most_microbatches + 1):
                try:
                    build(name, ranks=ranks, microbatches=microbatches)
                except ConfigError:
                    continue
                sizes.append((name, ranks, microbatches))
    return sizes


RUNNABLE = [name for name in names() if describe(name).runnable]
SIMULATED = [name for name in names() if not describe(name).runnable]


def test_golden_model() -> None:
    text = model(build("1f1b", ranks=2, microbatches=1).program())
    assert (
        """\
active proctype rank_1() {
  short message;
  /* 1RECV_F0 */
  ring_0_1?message; assert(message == 0);
  /* 1F0 */
  /* 1BW0 */
  busy_0_1[0] = false;
  /* 1SEND_B0 */
  queue_1_0!0;
  ended++
}
"""
        in text
    )
    assert "chan ring_0_1 = [2]" in text and "bool busy_0_1[2]" in text and "ended == 2;" in text


@spin
@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"),
    [("1f1b", 4, 6), ("interleaved-1f1b", 2, 4), ("hanayo", 3, 4), ("zb-h2", 3, 6), ("dualpipe", 2, 6)],
)
def test_no_interleaving_fails(name: str, ranks: int, microbatches: int, tmp_path: Path) -> None:
    assert explore(model(build(name, ranks=ranks, microbatches=microbatches).program()), tmp_path) == []


@spin
@pytest.mark.parametrize(
    ("name", "ranks", "skips"),
    [("1f1b", 3, [(0, 2)]), ("interleaved-1f1b", 2, [(0, 3), (0, 2)]), ("zb-h1", 3, [(0, 2)])],
)
def test_no_interleaving_with_skips_fails(name: str, ranks: int, skips: list[tuple[int, int]], tmp_path: Path) -> None:
    """Links past stages, with slots of their own."""
    program = build(name, ranks=ranks, microbatches=ranks).program(skips)
    assert (0, max(program.schedule.stages - 1, 2)) in program.slots
    assert explore(model(program), tmp_path) == []


@spin
@pytest.mark.full
@pytest.mark.parametrize(("name", "ranks", "microbatches"), programs(RUNNABLE, 4, 6))
def test_no_interleaving_of_a_runnable_schedule_fails(name: str, ranks: int, microbatches: int, tmp_path: Path) -> None:
    assert explore(model(build(name, ranks=ranks, microbatches=microbatches).program()), tmp_path) == []


@spin
@pytest.mark.full
@pytest.mark.parametrize(("name", "ranks", "microbatches"), programs(SIMULATED, 3, 4))
def test_no_interleaving_of_a_simulated_schedule_fails(
    name: str, ranks: int, microbatches: int, tmp_path: Path
) -> None:
    assert explore(model(build(name, ranks=ranks, microbatches=microbatches).program()), tmp_path) == []


def runs_with(program: Program, slots: dict[comms.Edge, int]) -> bool:
    """What the package's own sequential run says."""
    schedule = program.schedule
    try:
        comms.bounded_order(schedule, program.instructions, slots, schedule.simulate(comms.UNIT).spans)
    except ScheduleError:
        return False
    return True


@spin
@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "chunks"), [("1f1b", 3, 4, None), ("seq1f1b", 2, 1, 3), ("zb-h2", 2, 3, None)]
)
def test_too_few_slots_are_found(name: str, ranks: int, microbatches: int, chunks: int | None, tmp_path: Path) -> None:
    """One slot a link deadlocks; between that and the program's own numbers, Spin and the package agree."""
    program = build(name, ranks=ranks, microbatches=microbatches, chunks=chunks).program()
    verdicts = []
    for fewer in range(max(program.slots.values())):
        slots = {link: max(count - fewer, 1) for link, count in program.slots.items()}
        found = explore(model(program, slots), tmp_path)
        assert set(found) <= {"invalid end state"}
        assert runs_with(program, slots) == (not found)
        verdicts.append(not found)
    assert verdicts[0] and not verdicts[-1]


@spin
def test_a_message_that_nobody_takes_is_found(tmp_path: Path) -> None:
    program = build("1f1b", ranks=2, microbatches=2).program()
    lacking = tuple(one for one in program.instructions[1] if str(one) != "1RECV_F1")
    found = explore(model(program._replace(instructions=(program.instructions[0], lacking))), tmp_path)
    assert len(found) == 1 and found[0].startswith("assertion violated")


@spin
def test_a_message_in_another_place_is_found(tmp_path: Path) -> None:
    text = "pipekern-schedule name=x microbatches=2 stage_rank=0,1\n0F0 0F1 0BW0 0BW1\n1F0 1F1 1BW0 1BW1\n"
    program = Schedule.parse(text).program()
    swapped = tuple(
        one._replace(microbatch=1 - one.microbatch) for one in program.instructions[0] if one.op == "SEND_F"
    )
    rest = [one for one in program.instructions[0] if one.op != "SEND_F"]
    row = (rest[0], swapped[0], rest[1], swapped[1], *rest[2:])
    found = explore(model(program._replace(instructions=(row, program.instructions[1]))), tmp_path)
    assert len(found) == 1 and found[0].startswith("assertion violated (message==0)")
