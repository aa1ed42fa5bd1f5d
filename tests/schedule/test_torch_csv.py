"""Round trips through torch's own schedules, and through its own reader and writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed.pipelining.schedules as theirs

from pipekern.errors import ConfigError, ScheduleError
from pipekern.schedule import Action, Costs, Schedule, build, torch_csv


class Stage:
    """As much of torch's PipelineStage as a schedule looks at before it runs."""

    group_rank = 0
    submod = None

    def __init__(self, stage_index: int, group_size: int, num_stages: int):
        self.stage_index, self.group_size, self.num_stages = stage_index, group_size, num_stages
        self.is_first, self.is_last = stage_index == 0, stage_index == num_stages - 1


def torch_schedule(kind: str, ranks: int, microbatches: int, stages: int) -> Any:
    local = [Stage(stage, ranks, stages) for stage in range(0, stages, ranks)]
    return getattr(theirs, kind)(local, microbatches)


def loaded_by_torch(schedule: Schedule, path: Path) -> Any:
    """torch's schedule of the file that we write."""
    path.write_text(torch_csv.dumps(schedule), newline="")
    reader = torch_schedule("_PipelineScheduleRuntime", schedule.ranks, schedule.microbatches, schedule.stages)
    reader._load_csv(path)
    return reader


def without_bubbles(order: dict[int, list[Any]]) -> list[list[Any]]:
    return [[action for action in order[rank] if action is not None] for rank in sorted(order)]


def test_golden() -> None:
    schedule = Schedule.parse(
        "pipekern-schedule name=mine microbatches=2 stage_rank=0,1\n0F0 0F1 0BW0 0BW1\n1F0 1B0 1F1 1W0 1B1 1W1\n"
    )
    assert torch_csv.dumps(schedule) == "0F0,0F1,0B0,0B1\r\n1F0,1I0,1F1,1W0,1I1,1W1\r\n"
    assert torch_csv.loads(torch_csv.dumps(schedule), "mine") == schedule


def test_golden_pair() -> None:
    schedule = torch_csv.loads("0F0,0F1,(0F2;1B0)OVERLAP_F_B\r\n")
    assert schedule.actions == ((Action("F", 0, 0), Action("F", 0, 1), Action("F", 0, 2), Action("BW", 1, 0)),)
    assert schedule.pairs == {Action("F", 0, 2)}


KINDS = [
    ("ScheduleInterleaved1F1B", 4, 8, "interleaved-1f1b"),
    ("ScheduleLoopedBFS", 4, 8, None),  # takes the micro-batches of the backwards in reverse
    ("ScheduleInterleavedZeroBubble", 4, 8, None),
    ("ScheduleZBVZeroBubble", 4, 10, "zb-v"),
    ("ScheduleZBVZeroBubble", 4, 3, "zb-v"),
    ("ScheduleDualPipeV", 4, 10, "dualpipev"),
]


@pytest.mark.parametrize("form", ["compute_only", "compute_comms"])
@pytest.mark.parametrize(("kind", "ranks", "microbatches", "same"), KINDS)
def test_round_trip_of_torch_schedules(
    kind: str, ranks: int, microbatches: int, same: str | None, form: str, tmp_path: Path
) -> None:
    written = torch_schedule(kind, ranks, microbatches, 2 * ranks)
    written._dump_csv(tmp_path / "theirs.csv", form)
    schedule = torch_csv.loads((tmp_path / "theirs.csv").read_text())
    schedule.check()
    assert schedule.microbatches == microbatches and schedule.stages == 2 * ranks
    if same:
        ours = build(same, ranks=ranks, microbatches=microbatches)
        assert (schedule.actions, schedule.pairs, schedule.stage_rank) == (ours.actions, ours.pairs, ours.stage_rank)
    again = loaded_by_torch(schedule, tmp_path / "ours.csv")
    assert without_bubbles(again.pipeline_order) == without_bubbles(written.pipeline_order)
    assert again.pipeline_order_with_comms == written.pipeline_order_with_comms


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "looped-bfs", "zb-h1", "zb-h2", "v-half", "v-min", "hanayo"])
def test_torch_reads_and_runs_ours(name: str, tmp_path: Path) -> None:
    """torch adds its own sends and receives, and its simulator finds no deadlock; what it writes is ours again."""
    schedule = build(name, ranks=4, microbatches=8)
    reader = loaded_by_torch(schedule, tmp_path / "ours.csv")
    reader._dump_csv(tmp_path / "theirs.csv", "compute_only")
    assert torch_csv.loads((tmp_path / "theirs.csv").read_text(), name) == schedule
    order = theirs._add_send_recv(reader.pipeline_order, schedule.stage_rank.__getitem__, schedule.stages)
    theirs._simulate_comms_compute(order, schedule.stage_rank.__getitem__, schedule.stages)


def test_a_loaded_schedule_can_be_simulated() -> None:
    timeline = torch_csv.loads(torch_csv.dumps(build("1f1b", ranks=4, microbatches=8))).simulate(Costs(1, 1, 1))
    assert timeline.makespan == 33


@pytest.mark.parametrize(("name", "what"), [("chimera", "chains=2"), ("seq1f1b", "slices=2")])
def test_what_the_format_cannot_say(name: str, what: str) -> None:
    with pytest.raises(ConfigError, match=f"{what} of {name}: a CSV of torch has only"):
        torch_csv.dumps(build(name, ranks=4, microbatches=8))


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ["there is no action"]),
        ("0UNSHARD,,\r\n", ["there is no action"]),
        ("2F0,2B0", ["stage 0 is run by no rank", "stage 1 is run by no rank"]),
        (
            "0F0,0X0,F1\r\n1F0,(1F1;1I0)OVERLAP_F_B",
            ["rank 0, cell 1: '0X0'", "rank 0, cell 2: 'F1'", "rank 1, cell 1: '(1F1;1I0)OVERLAP_F_B'"],
        ),
    ],
)
def test_every_fault_of_a_file_is_listed(text: str, faults: list[str]) -> None:
    with pytest.raises(ScheduleError) as caught:
        torch_csv.loads(text)
    assert len(caught.value.faults) == len(faults)
    assert all(found.startswith(fault) for found, fault in zip(caught.value.faults, faults, strict=True))


def test_a_loaded_order_is_not_trusted() -> None:
    with pytest.raises(ScheduleError, match="rank 1 lacks 1BW0"):
        torch_csv.loads("0F0,0B0\r\n1F0\r\n").check()
