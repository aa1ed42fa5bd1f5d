"""How far a step is from what the simulator says of it, and what a backward in two costs over one in one.

    python -m benchmarks.prediction_cpu [--rounds 10] [--out benchmarks/results/prediction_cpu.csv]

Two ranks of one thread, each pinned to a core; the GPT of pipeline_cpu.py at dim 256. Schedules take turns in shuffled
rounds. A step is `train_step`, from a barrier until every rank has ended it. The costs that the simulation is given are
the medians of each stage's F and B and W (or BW) in the same step. ``backward_ms`` is what one micro-batch's backwards
take in all stages together; ``split_over_fused`` is its ratio, round by round, to that of the schedule with as many
stages whose backward is whole.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch.distributed as dist

import pipekern as pk
from benchmarks.pipelines.case import Case, gpt
from benchmarks.pipelines.machine import describe
from benchmarks.pipelines.ours import Ours
from benchmarks.pipelines.rank import step_seconds
from benchmarks.record import write
from benchmarks.two_ranks import start

FUSED = {2: "1f1b", 4: "interleaved-1f1b", 8: "interleaved-1f1b"}  # by stages
GRID = [("1f1b", 1), ("zb-h1", 1), ("zb-h2", 1), ("interleaved-1f1b", 2), ("zb-v", 2), ("v-half", 2)]
GRID += [("zb-interleaved", 2), ("interleaved-1f1b", 4), ("zb-interleaved", 4)]


class Round(NamedTuple):
    """One step, in milliseconds: how long it took, what the simulator says, one micro-batch's backwards."""

    step: float
    simulated: float
    backward: float


class Measured:
    """One schedule on one case, and its rounds."""

    def __init__(self, schedule: str, chunks: int, case: Case):
        self.schedule, self.stages = schedule, 2 * chunks
        self.microbatches = case.microbatches
        self._order = pk.schedule.build(schedule, ranks=2, microbatches=case.microbatches, chunks=chunks)
        self._ours = Ours(schedule, chunks, case)
        self.rounds: list[Round] = []

    def round(self) -> None:
        """One step to warm the caches, and one that counts; collective."""
        self._ours.step()
        seconds = step_seconds(self._ours.train)
        self._ours.update()
        spans: dict[tuple[str, int], list[float]] = defaultdict(list)
        for span in self._ours.timeline().spans:
            spans[span.op, span.stage].append((span.end - span.start) / 1e3)
        forward, backward, weight, whole = (
            [median(spans.get((op, stage), [0.0])) for stage in range(self.stages)] for op in ("F", "B", "W", "BW")
        )
        backward = [a + b for a, b in zip(backward, whole, strict=True)]
        simulated = self._order.simulate(pk.schedule.Costs(forward, backward, weight)).makespan
        self.rounds.append(Round(seconds * 1e3, float(simulated), sum(backward) + sum(weight)))

    def close(self) -> None:
        """Leave the job."""
        self._ours.close()


def main() -> None:
    """Start two ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write a CSV file")
    options = parser.parse_args()
    start("benchmarks.prediction_cpu")
    dist.init_process_group("gloo")
    rows = [row for m in (2, 4, 8) for row in measure(gpt(256, 8, 128, 4, m, steps=1), options.rounds)]
    if dist.get_rank() == 0:
        for row in rows:
            print("  ".join(f"{value:>16}" for value in row.values()), flush=True)
        if options.out:
            write(options.out, describe(), rows)
    dist.barrier()
    dist.destroy_process_group()


def measure(case: Case, rounds: int) -> list[dict[str, str]]:
    """A row a schedule; collective."""
    running = [Measured(schedule, chunks, case) for schedule, chunks in GRID]
    for number in range(rounds):
        for one in random.Random(number).sample(running, len(running)):
            one.round()
    rows = [_row(one, running) for one in running]
    for one in running:
        one.close()
    return rows


def _row(one: Measured, running: list[Measured]) -> dict[str, str]:
    fused = next(each for each in running if (each.schedule, each.stages) == (FUSED[one.stages], one.stages))
    columns = {
        "step_ms": [r.step for r in one.rounds],
        "step_over_simulated": [r.step / r.simulated for r in one.rounds],
        "backward_ms": [r.backward for r in one.rounds],
        "split_over_fused": [a.backward / b.backward for a, b in zip(one.rounds, fused.rounds, strict=True)],
    }
    row = {"microbatches": str(one.microbatches), "schedule": one.schedule, "stages": str(one.stages)}
    for name, values in columns.items():
        for quartile, value in zip(("q1", "median", "q3"), quantiles(values, n=4), strict=True):
            row[f"{name}_{quartile}"] = f"{value:.4g}"
    return {**row, "rounds": str(len(one.rounds))}


if __name__ == "__main__":
    main()
