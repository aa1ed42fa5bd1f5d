"""What every rank holds, by kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from pipekern.errors import ConfigError
from pipekern.plan.cost import Layer
from pipekern.schedule.comms import Program
from pipekern.schedule.ir import Schedule


@dataclass(frozen=True)
class ParameterBytes:
    """Bytes a parameter: the ``weights`` that stages compute with, ``gradients``, and what the ``optimizer`` keeps."""

    weights: float
    gradients: float
    optimizer: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 0:
                raise ConfigError(f"{name}={value} bytes a parameter; give at least 0")

    def over(self, replicas: int, zero: int, resting: bool = False) -> ParameterBytes:
        """On each of ``replicas``, at the peak of a step, or ``resting`` between its end and the next one's start.

        From ``zero`` 1 on the optimizer's part is shared out, and a sum over replicas has memory of its own beside the
        gradients, of one share; from 2 on gradients are whole only within a step. At 3 weights are, too: then what an
        optimizer changes is apart from them. On a CPU the parts of a sum arrive in memory of their own
        besides, which at a peak is as much as the gradients.
        """
        if not (replicas >= 1 and 0 <= zero <= 3):
            raise ConfigError(f"replicas={replicas}, zero={zero}: give at least 1 replica, and zero from 0 to 3")
        if not zero:
            return self
        masters = self.weights if zero == 3 and self.weights >= 4 else 0.0
        weights = 0.0 if zero == 3 and resting else self.weights
        whole = 0.0 if zero > 1 and resting else self.gradients
        return ParameterBytes(weights, whole + self.gradients / replicas, (self.optimizer + masters) / replicas)


FLOAT32 = ParameterBytes(weights=4, gradients=4, optimizer=8)  # Adam's two moments
MIXED = ParameterBytes(weights=2, gradients=4, optimizer=12)  # bf16 copies; float32 gradients, masters, moments


@dataclass(frozen=True)
class RankMemory:
    """Bytes that a rank holds at its peak. ``slots`` are the rings in which its messages arrive."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    slots: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.slots

    def __str__(self) -> str:
        return ", ".join(f"{kind} {size(value)}" for kind, value in asdict(self).items())


def size(value: float) -> str:
    """Bytes for a reader: ``3.2 GiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def rank_memory(program: Program, stages: Sequence[Sequence[Layer]], bytes_each: ParameterBytes) -> list[RankMemory]:
    """What each rank holds with the layers ``stages[d]`` at depth d.

    Activations are counted exactly in the order of the schedule, whole from F to W. An asynchronous schedule keeps two
    versions of the weights. Gradients of the loss and what the kernels use for themselves are not counted.
    """
    schedule = program.schedule
    versions = 1 if schedule.synchronous else 2
    parameters = [
        sum(layer.parameters for stage in schedule.stages_of(rank) for layer in stages[stage % schedule.depth])
        for rank in range(schedule.ranks)
    ]
    held = activation_bytes(schedule, [sum(layer.activations for layer in stage) for stage in stages])
    outputs = [stage[-1].output / schedule.slices for stage in stages]
    rings = slot_bytes(program, lambda a, b: outputs[min(a, b) % schedule.depth])
    return [
        RankMemory(
            count * bytes_each.weights * versions,
            count * bytes_each.gradients,
            count * bytes_each.optimizer,
            kept,
            ring,
        )
        for count, kept, ring in zip(parameters, held, rings, strict=True)
    ]


def activation_bytes(schedule: Schedule, kept: Sequence[float]) -> list[float]:
    """The most that each rank holds in the order of ``schedule``, where a micro-batch leaves ``kept[d]`` at depth d."""
    peaks = []
    for row in schedule.actions:
        held = peak = 0.0
        for action in row:
            part = kept[action.stage % schedule.depth] / schedule.slices
            if action.op == "F":
                held += part
                peak = max(peak, held)
            elif action.op != "B":
                held -= part
        peaks.append(peak)
    return peaks


def slot_bytes(program: Program, message: Callable[[int, int], float]) -> list[float]:
    """Bytes of the rings in which each rank's messages arrive; ``message`` gives those of one, from stage to stage."""
    held = [0.0] * program.schedule.ranks
    for (source, target), count in program.slots.items():
        held[program.schedule.stage_rank[target]] += count * message(source, target)
    return held
