"""One training step by a pipeline, in one process or among several, against the unsplit model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from tests.launch import launch, values
from tests.runtime import reference

PLACES = pytest.mark.parametrize("processes", [False, True], ids=["one-process", "processes"])
# One chunk a rank and several; whole backwards, and weight gradients put off.
SCHEDULES = pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved-1f1b", "looped-bfs", "zb-h2", "v-half"])


def chunks(schedule: str) -> int:
    """Stages a rank, unless told otherwise."""
    return pk.schedule.describe(schedule).chunks[0]


class Step(NamedTuple):
    """What one step leaves on a process, or on all together: gradients and state by name."""

    loss: Tensor
    gradients: dict[str, Any]
    state: dict[str, Tensor]


def run(processes: bool, worker: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """``worker(ranks, *args)`` on each of ``ranks`` processes, or once in this one; one value a process."""
    return values(launch(worker, ranks, ranks, *args)) if processes else [worker(ranks, *args)]


def union(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All processes' entries; those of the same name must have the same bits."""
    union: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, Tensor) and name in union:
                assert torch.equal(union[name], value), f"two ranks hold different copies of {name}"
            union[name] = value
    return union


def make_seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The same model in float64 wherever it is made."""
    torch.manual_seed(seed)
    return make().double()


def gradients(pipe: pk.Pipeline) -> dict[str, Any]:
    """Copies of this process's gradients."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in pipe.named_parameters()}


def _one_step(ranks: int, make: Callable[[], nn.Module], seed: int, x: Any, y: Any, options: dict[str, Any]) -> Step:
    with pk.Pipeline(make_seeded(make, seed), ranks=ranks, timeout=20.0, **options) as pipe:
        loss = pipe.train_step(x, y)
        return Step(loss, gradients(pipe), {name: value.clone() for name, value in pipe.state_dict().items()})


def check(
    make: Callable[[], nn.Module],
    loss_fn: Callable[[Any, Any], Any],
    x: Any,
    y: Any,
    *,
    processes: bool,
    seed: int,
    reference_loss: Callable[[Any, Any], Tensor] | None = None,
    microbatches: int = 4,
    ranks: int = 2,
    coupled: bool = False,
    **options: Any,
) -> Step:
    """Fail unless loss, every gradient and the state after one step equal the unsplit model's within 1e-12.

    ``make`` is a class or module-level function. ``reference_loss``: of the unsplit model, if it is another function.
    """
    options |= {"loss_fn": loss_fn, "microbatches": microbatches}
    steps = run(processes, _one_step, ranks, make, seed, x, y, options)
    assert all(torch.equal(step.loss, steps[0].loss) for step in steps), "the ranks' losses differ"
    got = Step(steps[0].loss, union([step.gradients for step in steps]), union([step.state for step in steps]))
    model = make_seeded(make, seed)
    loss = reference.step(model, reference_loss or loss_fn, x, y, microbatches if coupled else 1)
    assert got.loss.dim() == 0
    assert abs(float(got.loss) - float(loss)) <= 1e-12, f"loss {float(got.loss)}, wanted {float(loss)}"
    error = reference.distance(got.gradients, reference.gradients(model))
    assert error <= 1e-12, f"gradients differ by {error:.2e}"
    assert reference.distance(got.state, dict(model.state_dict())) <= 1e-12, "the state differs"
    return got
