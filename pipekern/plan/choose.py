"""Which schedule, and which cut of the layers: every schedule is built, cut for, and simulated; the fastest wins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from pipekern.errors import ConfigError
from pipekern.plan.cluster import Cluster, Device, Link
from pipekern.plan.cost import Layer
from pipekern.plan.partition import StageMemory, partition
from pipekern.schedule.ir import Schedule
from pipekern.schedule.registry import build, describe, names
from pipekern.schedule.simulate import Costs, peak_activations

CLOSE = 1.01  # times nearer than this are taken as equal: costs are not known any better
_MOST_CHUNKS = 4


@dataclass(frozen=True)
class Choice:
    """A schedule and the cut for it: ``split[d]`` layers at depth d. Times in microseconds.

    ``peak`` is the most activations that a rank holds, in micro-batches through its whole share.
    """

    schedule: Schedule
    split: tuple[int, ...]
    makespan: float
    span: float
    bubble_ratio: float
    peak: float
    messages: int


class Choices(NamedTuple):
    """``found``, the fastest first; ``refused``: name and reason of the others."""

    found: list[Choice]
    refused: dict[str, str]


def choose(
    forward: Sequence[float],
    backward: Sequence[float],
    *,
    ranks: int,
    microbatches: int,
    weight: Sequence[float] | None = None,
    outputs: Sequence[float] | None = None,
    link: Link | None = None,
    overhead: float = 0.0,
    chunks: int | None = None,
    memory: float | None = None,
    schedules: Sequence[str] | None = None,
) -> Choice:
    """The schedule and split with the shortest step for layers of known costs on ``ranks`` equal devices.

    ``forward`` and ``backward`` are microseconds a layer of one micro-batch; ``backward`` is the whole of it, or the
    input gradient alone where ``weight`` gives the weight gradient. ``outputs`` are the bytes that each layer hands to
    the next, if they are known: with ``link`` they make the time of a message. ``overhead`` is what an action costs
    besides. ``chunks`` is a number of stages a rank to keep to; ``memory`` caps the peak a rank, in activations of one
    micro-batch through its whole share. ``schedules`` are names to choose from (default: all that can be run and are
    synchronous). Among schedules within 1 % of the fastest the one that holds the fewest activations is taken.

    Raises ``ConfigError`` for bad costs and where no schedule is left, with the reason of each.
    """
    count = len(forward)
    lists = [forward, backward, weight or [0.0] * count, outputs or [0.0] * count]
    if any(len(values) != count for values in lists):
        raise ConfigError(f"costs of {', '.join(str(len(values)) for values in lists)} layers; give one value a layer")
    if not ranks >= 1:
        raise ConfigError(f"ranks={ranks}: there is no device; give at least 1")
    layers = [Layer(f"layer {i}", f, b, w, output=o) for i, (f, b, w, o) in enumerate(zip(*lists, strict=True))]
    cluster = Cluster.of([Device(1.0)] * ranks, link)
    found, refused = choices(layers, cluster, microbatches, schedules=schedules, chunks=chunks, overhead=overhead)
    for choice in found:
        if memory is not None and not choice.peak <= memory:
            refused[label(choice)] = f"holds {choice.peak} activations, more than memory={memory}"
    fitting = [choice for choice in found if memory is None or choice.peak <= memory]
    if not fitting:
        raise ConfigError(_none_left(ranks, microbatches, refused))
    return lightest(fitting)


def choices(
    layers: Sequence[Layer],
    cluster: Cluster,
    microbatches: int,
    *,
    schedules: Sequence[str] | None = None,
    chunks: int | None = None,
    overhead: float = 0.0,
) -> Choices:
    """Every schedule that takes these ranks and micro-batches, each with the best cut for its own stages."""
    found, refused = [], {}
    for name, count in _offered(schedules, chunks, len(layers), cluster.ranks):
        try:
            schedule = build(name, ranks=cluster.ranks, microbatches=microbatches, chunks=count)
            if schedules is None and not (schedule.runnable and schedule.trains):
                raise ConfigError(f"{name} can be simulated but not run")
            found.append(cut(schedule, layers, cluster, overhead=overhead))
        except ConfigError as error:
            refused[name if count is None else f"{name}, {count} chunks"] = str(error)
    found.sort(key=lambda choice: (choice.makespan, choice.peak, choice.messages, choice.schedule.name))
    return Choices(found, refused)


def lightest(found: Sequence[Choice]) -> Choice:
    """Of those as good as the fastest the one that holds the least, then the one with the fewest messages."""
    limit = min(choice.makespan for choice in found) * CLOSE
    return min(
        (choice for choice in found if choice.makespan <= limit),
        key=lambda choice: (choice.peak, choice.messages, choice.makespan, choice.schedule.name),
    )


def label(choice: Choice) -> str:
    """Its name, chunks or slices, and micro-batches."""
    schedule = choice.schedule
    parts = [
        schedule.name,
        f"{schedule.chunks} chunks" * (schedule.chunks > 1),
        f"{schedule.slices} slices" * (schedule.slices > 1),
        f"{schedule.microbatches} micro-batches",
    ]
    return ", ".join(filter(None, parts))


def cut(
    schedule: Schedule,
    layers: Sequence[Layer],
    cluster: Cluster,
    *,
    overhead: float = 0.0,
    memory: StageMemory | None = None,
) -> Choice:
    """``schedule`` with the best cut of ``layers`` for it; raises ``ConfigError`` where there is none.

    The cut is exact for the smallest sum + (m - 1) × bottleneck of stages; with several chunks a rank that is taken of
    the stages, not of the ranks. ``memory`` caps the stages.
    """
    if schedule.depth > len(layers):
        raise ConfigError(
            f"{schedule.name} has {schedule.depth} stages and the model {len(layers)} layers; every stage needs one: "
            "use fewer ranks or chunks"
        )
    copies = [0.0, *(cluster.copy(layer.output) for layer in layers[:-1]), 0.0]
    found = partition(
        [layer.forward + layer.backward + layer.weight for layer in layers],
        schedule.depth,
        speeds=_speeds(schedule, cluster),
        cut_costs=copies,
        memory=memory,
        microbatches=schedule.microbatches * schedule.chunks,
    )
    stages = [layers[start:end] for start, end in pairwise(found.bounds)]
    timeline = schedule.simulate(costs(schedule, stages, cluster, overhead))
    return Choice(
        schedule,
        tuple(map(len, stages)),
        timeline.makespan,
        timeline.span,
        timeline.bubble_ratio,
        max(peak_activations(schedule)),
        timeline.messages,
    )


def costs(schedule: Schedule, stages: Sequence[Sequence[Layer]], cluster: Cluster, overhead: float = 0.0) -> Costs:
    """What each stage costs on its rank with the layers ``stages[d]`` at depth d, copies of messages included."""
    forward, backward, weight, comm = [], [], [], []
    for stage, rank in enumerate(schedule.stage_rank):
        own = stages[stage % schedule.depth]
        speed = cluster.speed(rank)
        sent = _sent(schedule, stages, stage, schedule.next_stage(stage))
        back = _sent(schedule, stages, schedule.previous_stage(stage), stage)
        forward.append(sum(layer.forward for layer in own) / speed + cluster.copy(sent) + overhead)
        backward.append(sum(layer.backward for layer in own) / speed + cluster.copy(back) + overhead)
        weight.append(sum(layer.weight for layer in own) / speed)
        if stage + 1 < schedule.stages:
            comm.append(cluster.message(rank, schedule.stage_rank[stage + 1], sent / schedule.slices))
    return Costs(forward, backward, weight, comm)


def _sent(schedule: Schedule, stages: Sequence[Sequence[Layer]], source: int | None, target: int | None) -> float:
    """Bytes of a message between neighbouring stages; none within a rank and beyond the ends."""
    if source is None or target is None or schedule.stage_rank[source] == schedule.stage_rank[target]:
        return 0.0
    return stages[source % schedule.depth][-1].output


def _speeds(schedule: Schedule, cluster: Cluster) -> list[float]:
    """Of every depth; with two directions the slower of its two ranks."""
    speeds = [cluster.speed(rank) for rank in schedule.stage_rank]
    return [min(speeds[depth :: schedule.depth]) for depth in range(schedule.depth)]


def _offered(
    schedules: Sequence[str] | None, chunks: int | None, layers: int, ranks: int
) -> Iterator[tuple[str, int | None]]:
    """Names, with the numbers of chunks to try: those given, or the fewest and up to 4."""
    for name in names() if schedules is None else schedules:
        entry = describe(name)
        if schedules is None and not (entry.runnable and entry.synchronous):
            continue
        if chunks is not None:
            yield name, chunks
        elif len(entry.chunks) == 1 or entry.sliced:
            yield name, None
        else:
            fitting = [
                count for count in entry.chunks[:_MOST_CHUNKS] if count <= _MOST_CHUNKS and count * ranks <= layers
            ]
            yield from ((name, count) for count in fitting or entry.chunks[:1])


def _none_left(ranks: int, microbatches: int, refused: dict[str, str]) -> str:
    reasons = "".join(f"\n  * {name}: {reason}" for name, reason in refused.items())
    return f"no schedule for {ranks} ranks and {microbatches} micro-batches:{reasons}"
