"""What a step costs: measured, simulated from its stages' measured costs, and beside the unsplit model on one core."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

import pipekern as pk
from pipekern.schedule import Costs, Schedule
from pipekern.trace.timeline import Timeline

MOST_SECONDS = 15.0


@dataclass(frozen=True)
class Speed:
    """Seconds a step, medians over rounds in which the pipeline and the unsplit model took turns.

    ``simulated`` is the makespan of the schedule under the measured costs of its stages, and ``rest``: what a step
    takes around that (batch, loss, clipping, optimizer). ``timeline`` is the step whose makespan is the median.
    """

    pipeline: float
    simulated: float
    rest: float
    unsplit: float
    bubble_ratio: float
    simulated_bubble_ratio: float
    timeline: Timeline

    @property
    def speedup(self) -> float:
        return self.unsplit / self.pipeline


def measure(
    pipe: pk.Pipeline, schedule: Schedule, step: Callable[[], object], unsplit_step: Callable[[], object], rounds: int
) -> Speed:
    """Time ``step`` on all ranks and ``unsplit_step`` on rank 0 while the others wait, in turn; collective.

    On a slow machine there are fewer ``rounds``: no new one begins after 15 seconds.
    """
    alone = unsplit_step if dist.get_rank() == 0 else _wait
    pipeline: list[float] = []
    unsplit: list[float] = []
    timelines: list[Timeline] = []
    while len(pipeline) < rounds and sum(pipeline) + sum(unsplit) < MOST_SECONDS:
        pipeline.append(seconds(step))
        timelines.append(pipe.timeline())
        unsplit.append(seconds(alone))
    rest = median(whole - timeline.makespan / 1e6 for whole, timeline in zip(pipeline, timelines, strict=True))
    simulated = schedule.simulate(stage_costs(timelines, schedule))
    return Speed(
        pipeline=median(pipeline),
        simulated=simulated.makespan / 1e6 + rest,
        rest=rest,
        unsplit=median(unsplit),
        bubble_ratio=median(timeline.bubble_ratio for timeline in timelines),
        simulated_bubble_ratio=simulated.bubble_ratio,
        timeline=sorted(timelines, key=lambda timeline: timeline.makespan)[len(timelines) // 2],
    )


def _wait() -> None:
    """What a rank does in the other's turn."""


def seconds(work: Callable[[], object]) -> float:
    """From a barrier until every rank has ended its ``work``; the same number on every rank."""
    dist.barrier()
    start = time.perf_counter()
    work()
    took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def stage_costs(timelines: Sequence[Timeline], schedule: Schedule) -> Costs:
    """Median costs of every stage, in microseconds.

    Sending is the sender's work, and so a part of F and BW; ``comm`` is what remains of a message's way, seen
    where the receiver waited for it: from the end of the send to the end of the wait.
    """
    forward: list[list[float]] = [[] for _ in range(schedule.stages)]
    backward: list[list[float]] = [[] for _ in range(schedule.stages)]
    latency: list[float] = []
    for timeline in timelines:
        work, waits = _read(timeline)
        for (op, stage, _), (cost, _) in work.items():
            (forward if op == "F" else backward)[stage].append(cost)
        latency.extend(end - work[source][1] for source, start, end in waits if work[source][1] > start)
    return Costs(
        forward=[median(costs) for costs in forward],
        backward=[median(costs) for costs in backward],
        weight=[0.0] * schedule.stages,
        comm=max(0.0, median(latency)) if latency else 0.0,
    )


Key = tuple[str, int, int]


def _read(timeline: Timeline) -> tuple[dict[Key, tuple[float, float]], list[tuple[Key, float, float]]]:
    """Every F and BW with its cost and when its result was sent; every receive: what made its message, start, end."""
    work: dict[Key, tuple[float, float]] = {}
    waits: list[tuple[Key, float, float]] = []
    for _, op, stage, microbatch, start, end in timeline.spans:
        forwarded = ("F", stage, microbatch) in work
        if op in ("F", "BW"):
            work[op, stage, microbatch] = (end - start, end)
        elif op == "SEND":
            made = ("BW" if ("BW", stage, microbatch) in work else "F", stage, microbatch)
            work[made] = (work[made][0] + end - start, end)
        else:
            waits.append((("BW", stage + 1, microbatch) if forwarded else ("F", stage - 1, microbatch), start, end))
    return work, waits
