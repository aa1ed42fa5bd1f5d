"""How soon a stage that has become slow is named, how often one that has not, and what watching costs.

    python -m benchmarks.watch_cpu [--steps 1100] [--burners 0 1 2] [--out benchmarks/results/watch_cpu.csv]

Two ranks of one thread on the 1f1b schedule, 8 layers Linear(256, 256), 64 samples in 8 micro-batches, while so many
other processes burn the machine's cores. In a trial the measured times of one stage are multiplied from some step on:
every 10th step is tried, for both stages. ``within_10`` are the trials in which that stage is the first to be named,
and within 10 steps; ``alarms`` those of the record as it is, by single steps and by sums over five. A cost is of one
step on the rank that spends most: of all that the watch does, the mean of 5 steps in a row, for several steps are told
at once; the median of those means, for others use the cores.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import pipekern as pk
from benchmarks.pipelines.machine import describe
from benchmarks.record import write
from benchmarks.two_ranks import start
from pipekern.plan.drift import STEPS, SUMS, Drift
from pipekern.runtime.watch import BLOCK

WITHIN, EVERY = 10, 10
READY = STEPS.settling + STEPS.learning


@contextmanager
def burning(processes: int) -> Iterator[None]:
    """So many other processes use the cores of this one's machine; rank 0 starts them."""
    loop = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(loop) for _ in range(processes)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


class Timed:
    """Methods of the watch of ``pipe``: ``seconds`` spent in each step, and ``heard``, what it has been told of."""

    def __init__(self, pipe: pk.Pipeline):
        self.seconds: list[float] = []
        self.heard: list[list[int]] = []  # of each step, each stage's fastest and sum, ns
        watch: Any = pipe._training.watch
        judge = watch._judge
        watch.note = self._first(watch.note)
        watch.tell, watch.hear = self._adding(watch.tell), self._adding(watch.hear)

        def kept(rows: Sequence[Sequence[int]]) -> None:
            self.heard.append([time for row in rows for time in row[1:]])
            judge(rows)

        watch._judge = kept

    def _adding(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            before = time.perf_counter()
            result = method(*args)
            self.seconds[-1] += time.perf_counter() - before
            return result

        return timed

    def _first(self, method: Callable[..., Any]) -> Callable[..., Any]:
        timed = self._adding(method)

        def first(*args: Any) -> Any:
            self.seconds.append(0.0)
            return timed(*args)

        return first


def record(steps: int) -> tuple[list[list[int]], float, float]:
    """Of a run: what was heard of every step, microseconds that watching costs a step, milliseconds of a step."""
    torch.manual_seed(0)
    net, x = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))), torch.randn(64, 256)
    with pk.Pipeline(net, loss_fn=nn.MSELoss(), microbatches=8, schedule="1f1b") as pipe:
        timed = Timed(pipe)
        clock = [time.perf_counter()]
        for _ in range(steps):
            pipe.train_step(x, x)
            for parameter in pipe.parameters():
                parameter.grad = None
            clock.append(time.perf_counter())
    means = [fmean(timed.seconds[at : at + BLOCK]) for at in range(READY, steps - BLOCK, BLOCK)]
    cost = torch.tensor(median(means) * 1e6)
    dist.all_reduce(cost, op=dist.ReduceOp.MAX)
    return timed.heard, float(cost), median(b - a for a, b in pairwise(clock)) * 1e3


def alarms(drift: Drift, rows: Sequence[Sequence[float]]) -> int:
    """How often a stage is named."""
    return sum(change.factor > 1 for row in rows for change in drift.see(row))


def trials(rows: Sequence[Sequence[float]], factor: float) -> list[int | None]:
    """In how many steps the stage that is slowed is the first that is named, if it is."""
    drift, found = Drift(len(rows[0])), []
    for at, row in enumerate(rows[: len(rows) - 2 * WITHIN]):
        if at >= READY and at % EVERY == 0 and not drift.slow:
            for part in range(len(row)):
                found.append(_named(copy.deepcopy(drift), rows[at : at + 2 * WITHIN], part, factor))
        drift.see(row)
    return found


def _named(drift: Drift, rows: Sequence[Sequence[float]], part: int, factor: float) -> int | None:
    for step, row in enumerate(rows, 1):
        for change in drift.see([t * factor if i == part else t for i, t in enumerate(row)]):
            return step if change.part == part else None
    return None


def summary(burners: int, steps: int) -> Iterator[dict[str, object]]:
    """A row for each factor; collective."""
    heard, cost, step = record(steps)
    load = os.getloadavg()[0]
    fastest, sums = [row[::2] for row in heard], [row[1::2] for row in heard]
    blocks = [[sum(column) for column in zip(*sums[at : at + BLOCK], strict=True)] for at in range(0, steps, BLOCK)]
    for factor in (1.5, 2.0):
        found = trials(fastest, factor)
        named = [steps for steps in found if steps is not None]
        yield {
            "burners": burners,
            "load_average": f"{load:.1f}",
            "step_ms": f"{step:.2f}",
            "cost_us": f"{cost:.1f}",
            "steps": len(heard),
            "alarms": alarms(Drift(2), fastest),
            "alarms_by_sums": alarms(Drift(2, SUMS), blocks),
            "factor": factor,
            "trials": len(found),
            "within_10": sum(steps <= WITHIN for steps in named),
            "steps_mean": f"{fmean(named):.1f}",
            "steps_max": max(named),
        }


def main() -> None:
    """Start two ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--burners", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="write a CSV file")
    options = parser.parse_args()
    start("benchmarks.watch_cpu")
    dist.init_process_group("gloo")
    os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))  # where a rank runs is the system's to say, as in training
    rows: list[dict[str, object]] = []
    for burners in options.burners:
        with burning(burners if dist.get_rank() == 0 else 0):
            rows += summary(burners, options.steps)
            dist.barrier()
    if dist.get_rank() == 0:
        for row in rows:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if options.out:
            write(options.out, describe(), rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
