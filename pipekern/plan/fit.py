"""A whole plan: micro-batches, schedule, cut, memory of every rank; or by how much it does not fit, and what would."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

from pipekern.errors import ConfigError
from pipekern.plan.choose import CLOSE, Choice, choices, cut, label
from pipekern.plan.cluster import Cluster
from pipekern.plan.cost import Layer, Model
from pipekern.plan.memory import MIXED, ParameterBytes, RankMemory, rank_memory, size
from pipekern.plan.partition import StageMemory, partition_types
from pipekern.schedule.comms import Program
from pipekern.schedule.simulate import peak_activations

Order = Literal["fixed", "any"]
_MOST_MICROBATCHES = 8  # a rank, when they are not given: more hardly shortens the step
_MANY_MICROBATCHES = 32  # a rank, to save memory


@dataclass(frozen=True)
class Plan:
    """How a model is to be trained on a cluster. Times in microseconds, memory in bytes.

    ``layers`` are those of one micro-batch of ``samples``; rank r runs on ``cluster.devices[r]``, of which
    ``devices[r]`` is the place in the cluster that was asked about.
    """

    choice: Choice
    samples: float
    layers: tuple[Layer, ...]
    cluster: Cluster
    devices: tuple[int, ...]
    memory: tuple[RankMemory, ...]

    @property
    def step_time(self) -> float:
        """Of the computing and the messages; the optimizer is not in it."""
        return self.choice.makespan

    def layers_of(self, rank: int) -> list[range]:
        """The layers of each stage of ``rank``."""
        ends = [0, *accumulate(self.choice.split)]
        depth = self.choice.schedule.depth
        return [range(*list(pairwise(ends))[s % depth]) for s in self.choice.schedule.stages_of(rank)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        schedule = self.choice.schedule
        return {
            "schedule": schedule.name,
            "chunks": schedule.chunks,
            "microbatches": schedule.microbatches,
            "samples_per_microbatch": self.samples,
            "split": list(self.choice.split),
            "step_us": self.step_time,
            "bubble_ratio": self.choice.bubble_ratio,
            "messages": self.choice.messages,
            "ranks": [
                {
                    "rank": rank,
                    "device": self.cluster.devices[rank].name,
                    "place": self.devices[rank],
                    "layers": [[part.start, part.stop] for part in self.layers_of(rank)],
                    "memory": asdict(memory) | {"total": memory.total},
                    "capacity": capacity if math.isfinite(capacity := self.cluster.devices[rank].memory) else None,
                }
                for rank, memory in enumerate(self.memory)
            ],
        }


def fit(
    model: Model,
    cluster: Cluster,
    *,
    samples: int,
    microbatches: Sequence[int] | None = None,
    schedules: Sequence[str] | None = None,
    bytes_each: ParameterBytes = MIXED,
    order: Order = "fixed",
    overhead: float = 0.0,
) -> Plan:
    """The plan with the shortest step of ``samples`` samples that fits into the memory of every device.

    ``microbatches`` are the numbers to try (default: the divisors of ``samples`` up to 8 a rank), ``schedules`` the
    names to choose from (default: all that can be run). With ``order="any"`` the devices are arranged too, as
    :func:`~pipekern.plan.partition_types` finds it best for 1F1B: all links must be equal, and the devices of few
    types. ``overhead`` is microseconds an action costs besides its layers.

    Of plans within 1 % of the fastest the one that holds the least is taken. Raises ``ConfigError`` for bad input, and
    where nothing fits: with what the nearest plan holds, by how much that is too much, and what would fit.
    """
    tries = _microbatches(samples, microbatches, cluster.ranks)
    if order == "any" and len(set(cluster.links)) > 1:
        raise ConfigError("order='any': devices can only be arranged where all links are equal; use order='fixed'")
    search = _Search(model, samples, schedules, bytes_each, overhead, order)
    best = search.best(cluster, tries)
    if best.excess > 0:
        raise ConfigError("\n  ".join([*_shortage(best), *_remedies(search, best, cluster, tries)]))
    return best.plan


def _microbatches(samples: int, given: Sequence[int] | None, ranks: int) -> list[int]:
    if samples < 1:
        raise ConfigError(f"samples={samples}: a step needs at least 1")
    if given is None:
        return _divisors(samples, _MOST_MICROBATCHES * ranks)
    wrong = [m for m in given if not 1 <= m <= samples]
    if wrong or not given:
        raise ConfigError(
            f"microbatches={list(given)}: give numbers from 1 to samples={samples}, a sample each at least"
        )
    return sorted(set(given))


def _divisors(samples: int, most: int) -> list[int]:
    return [m for m in range(1, min(samples, most) + 1) if samples % m == 0]


class Tried(NamedTuple):
    """A plan, and how many bytes its fullest rank has too much (below 0: to spare)."""

    plan: Plan
    excess: float

    @classmethod
    def of(cls, plan: Plan) -> Tried:
        """``plan`` against the memory of its devices."""
        return cls(plan, max(m.total - d.memory for m, d in zip(plan.memory, plan.cluster.devices, strict=True)))


@dataclass(frozen=True)
class _Search:
    model: Model
    samples: int
    schedules: Sequence[str] | None
    bytes_each: ParameterBytes
    overhead: float
    order: Order

    def best(self, cluster: Cluster, tries: Sequence[int]) -> Tried:
        """The fastest plan that fits, else the one that lacks the least."""
        plans: list[Plan] = []
        refused: dict[str, str] = {}
        for microbatches in tries:
            layers = self.model.layers(self.samples / microbatches, cluster.devices[0])
            place = self._places(layers, cluster, microbatches)
            placed = cluster.reordered(place)
            layers = [_on(layer, placed.devices[0].flops / cluster.devices[0].flops) for layer in layers]
            found, reasons = choices(layers, placed, microbatches, schedules=self.schedules, overhead=self.overhead)
            refused |= {f"{name} ({microbatches} micro-batches)": why for name, why in reasons.items()}
            plans += [Plan(c, self.samples / microbatches, tuple(layers), placed, place, ()) for c in found]
        if not plans:
            reasons_text = "".join(f"\n  * {name}: {reason}" for name, reason in refused.items())
            raise ConfigError(f"no schedule takes {cluster.ranks} ranks with these micro-batches:{reasons_text}")
        return self._first_that_fits(sorted(plans, key=lambda plan: (plan.step_time, plan.choice.peak)))

    def _first_that_fits(self, plans: Sequence[Plan]) -> Tried:
        fits: list[Tried] = []
        others: list[Tried] = []
        fastest = math.inf
        for plan in plans:
            if plan.step_time > fastest * CLOSE:
                break
            tried = self._weighed(plan)
            if tried.excess > 0:
                others.append(tried)
            else:
                fits.append(tried)
                fastest = min(fastest, tried.plan.step_time)
        if not fits:
            return min(others, key=lambda tried: tried.excess)
        close = [tried for tried in fits if tried.plan.step_time <= fastest * CLOSE]
        return min(close, key=lambda tried: max(memory.total for memory in tried.plan.memory))

    def _weighed(self, plan: Plan) -> Tried:
        """With the memory of its ranks; cut again under the caps where it does not fit and has a stage a rank."""
        schedule = plan.choice.schedule
        program = schedule.program()
        tried = Tried.of(self._held(plan, program))
        if tried.excess <= 0 or schedule.stages > schedule.ranks:
            return tried
        largest = max(layer.output for layer in plan.layers)
        rings = [0.0] * schedule.ranks
        for (_, target), count in program.slots.items():
            rings[target] += count * largest / schedule.slices
        memory = self._stage_memory(
            plan.layers,
            peak_activations(schedule),
            [max(0.0, device.memory - ring) for device, ring in zip(plan.cluster.devices, rings, strict=True)],
        )
        try:
            choice = cut(schedule, plan.layers, plan.cluster, overhead=self.overhead, memory=memory)
        except ConfigError:  # no cut fits either; the caller says what is missing
            return tried
        return Tried.of(self._held(replace(plan, choice=choice), program))

    def _held(self, plan: Plan, program: Program) -> Plan:
        bounds = pairwise([0, *accumulate(plan.choice.split)])
        stages = [plan.layers[start:end] for start, end in bounds]
        return replace(plan, memory=tuple(rank_memory(program, stages, self.bytes_each)))

    def _stage_memory(
        self, layers: Sequence[Layer], in_flight: Sequence[float], caps: Sequence[float]
    ) -> StageMemory | None:
        if all(math.isinf(cap) for cap in caps):
            return None
        each = self.bytes_each.weights + self.bytes_each.gradients + self.bytes_each.optimizer
        fixed = [layer.parameters * each for layer in layers]
        activations = [layer.activations for layer in layers]
        all_bytes = sum(fixed) + sum(activations) * max(in_flight)
        return StageMemory(fixed, activations, in_flight, [min(cap, all_bytes) for cap in caps])

    def _places(self, layers: Sequence[Layer], cluster: Cluster, microbatches: int) -> tuple[int, ...]:
        """The place in ``cluster`` of each rank's device, as good as a cut for 1F1B can be."""
        types = list(dict.fromkeys(cluster.devices))
        if self.order == "fixed" or len(types) == 1 or cluster.ranks > len(layers):
            return tuple(range(cluster.ranks))
        places = [[i for i, device in enumerate(cluster.devices) if device == kind] for kind in types]
        in_flight = [min(microbatches, cluster.ranks - rank) for rank in range(cluster.ranks)]
        arrange = partial(
            partition_types,
            [layer.forward + layer.backward + layer.weight for layer in layers],
            list(map(len, places)),
            [kind.flops / cluster.devices[0].flops for kind in types],
            cut_costs=[0.0, *(cluster.copy(layer.output) for layer in layers[:-1]), 0.0],
            microbatches=microbatches,
        )
        try:
            found = arrange(memory=self._stage_memory(layers, in_flight, [kind.memory for kind in types]))
        except ConfigError:  # not under 1F1B; another schedule may hold less
            found = arrange()
        return tuple(places[kind].pop(0) for kind in found.devices)


def _on(layer: Layer, speed: float) -> Layer:
    """On a first device that is ``speed`` times as fast."""
    times = (layer.forward / speed, layer.backward / speed, layer.weight / speed)
    return replace(layer, forward=times[0], backward=times[1], weight=times[2])


def _shortage(tried: Tried) -> Iterator[str]:
    plan, excess = tried
    devices = plan.cluster.devices
    rank = max(range(len(devices)), key=lambda r: plan.memory[r].total - devices[r].memory)
    yield (
        f"the plan does not fit: the nearest ({label(plan.choice)}) needs {size(plan.memory[rank].total)} on rank "
        f"{rank}, {size(excess)} more than the {size(devices[rank].memory)} of its {devices[rank].name}"
    )
    yield f"rank {rank} holds: {plan.memory[rank]}"


def _remedies(search: _Search, tried: Tried, cluster: Cluster, tries: Sequence[int]) -> Iterator[str]:
    """What would fit: each is tried before it is said."""
    yield f"would fit: the same plan on devices with {size(max(memory.total for memory in tried.plan.memory))}"
    for microbatches in (m for m in _divisors(search.samples, _MANY_MICROBATCHES * cluster.ranks) if m > max(tries)):
        if search.best(cluster, [microbatches]).excess <= 0:
            yield f"would fit: {microbatches} micro-batches"
            break
    if search.schedules is not None:
        other = replace(search, schedules=None).best(cluster, _microbatches(search.samples, None, cluster.ranks))
        if other.excess <= 0:
            yield f"would fit: {label(other.plan.choice)}"
    most = len(tried.plan.layers)
    link = cluster.links[-1] if cluster.links else None
    for ranks in sorted({*(cluster.ranks + (1 << k) for k in range(most.bit_length())), most}):
        if cluster.ranks < ranks <= most:
            wider = Cluster.of([*cluster.devices, *[cluster.devices[-1]] * (ranks - cluster.ranks)], link)
            if search.best(wider, tries).excess <= 0:
                yield f"would fit: {ranks} devices, those added like the last one"
                break
