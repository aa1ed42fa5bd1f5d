"""One case of the proof of gradients: trained by a pipeline, and by the unsplit model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pipekern as pk
from tests.runtime import reference
from tests.runtime.models import KINDS, batches, make
from tests.runtime.payloads import PAYLOADS

ALL = KINDS | PAYLOADS
TOLERANCE = 1e-12


class Case(NamedTuple):
    """What is trained, and how; ``steps`` by an optimizer, after two that add up."""

    kind: str
    schedule: str
    ranks: int
    microbatches: int
    transport: str = "auto"
    steps: int = 5

    def __str__(self) -> str:
        return f"{self.kind}, {self.schedule}, {self.ranks} ranks, {self.microbatches} micro-batches, {self.transport}"


class Trained(NamedTuple):
    """What a run leaves. Of a pipeline: on one process, under the names it has there."""

    initial: dict[str, Any]
    loss: Tensor
    gradients: dict[str, Any]  # after one step
    summed: dict[str, Any]  # after a second one without zero_grad
    evaluated: Tensor  # loss
    outputs: Any  # of the same batch, None on all ranks but the last stage's
    final: dict[str, Any]  # parameters and buffers after steps of AdamW


def allowed(case: Case) -> bool:
    """Whether the schedule takes this pair of ranks and micro-batches."""
    try:
        pk.schedule.build(case.schedule, ranks=case.ranks, microbatches=case.microbatches)
    except pk.ConfigError:
        return False
    return True


def train(case: Case, seed: int) -> Trained:
    """By the pipeline. Fails where evaluation changes a bit of any gradient, buffer or random state."""
    kind = ALL[case.kind]
    model = make(kind, seed)
    data = batches(kind, seed, 2 * case.microbatches, case.steps + 2)
    options: dict[str, Any] = {"schedule": case.schedule, "transport": case.transport, "timeout": 30.0}
    with pk.Pipeline(
        model, loss_fn=kind.loss_fn, microbatches=case.microbatches, ranks=case.ranks, seed=seed, **options
    ) as pipe:
        initial = _copies(pipe.state_dict())
        loss = pipe.train_step(*data[0])
        gradients = _gradients(pipe)
        pipe.train_step(*data[1])
        summed = _gradients(pipe)
        before = _everything(pipe)
        evaluated, outputs = pipe.eval_step(*data[2]), pipe.eval_step(data[2].x)
        assert same_bits(before, _everything(pipe)), "eval_step wrote"
        optimizer = pipe.optimizer(torch.optim.AdamW, lr=1e-3)
        for batch in data[2:]:
            optimizer.zero_grad()
            pipe.train_step(*batch)
            optimizer.step()
        return Trained(initial, loss, gradients, summed, evaluated, outputs, _copies(pipe.state_dict()))


def wanted(case: Case, seed: int, initial: dict[str, Any]) -> Trained:
    """By the unsplit model, from the same weights."""
    kind = ALL[case.kind]
    model = make(kind, seed)
    if not isinstance(model, nn.Module):
        model = nn.Sequential(*(spec.build(0, 0) for spec in model))
        model.load_state_dict(initial)
    data = batches(kind, seed, 2 * case.microbatches, case.steps + 2)
    parts = case.microbatches if kind.coupled else 1
    begin = _copies(model.state_dict())
    loss = reference.step(model, kind.loss_fn, *data[0], parts)
    gradients = reference.gradients(model)
    reference.step(model, kind.loss_fn, *data[1], parts)
    summed = reference.gradients(model)
    outputs = reference.evaluate(model, data[2].x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in data[2:]:
        optimizer.zero_grad()
        reference.step(model, kind.loss_fn, *batch, parts)
        optimizer.step()
    evaluated = kind.loss_fn(outputs, data[2].y)
    return Trained(begin, loss, gradients, summed, evaluated, outputs, _copies(model.state_dict()))


def merged(runs: list[Trained]) -> Trained:
    """What all processes have, under the original module's names; a name that two have must have the same bits."""
    for a in runs:
        assert same_bits(a.loss, runs[0].loss), "the ranks' losses differ"
        assert same_bits(a.evaluated, runs[0].evaluated), "the ranks' evaluation losses differ"
    outputs = [run.outputs for run in runs if run.outputs is not None]
    assert len(outputs) == 1, f"{len(outputs)} ranks returned outputs"
    columns = [_union([getattr(run, name) for run in runs]) for name in ("initial", "gradients", "summed", "final")]
    return Trained(columns[0], runs[0].loss, columns[1], columns[2], runs[0].evaluated, outputs[0], columns[3])


def compare(case: Case, runs: list[Trained], seed: int, known: dict[Any, Trained] | None = None) -> None:
    """Fail unless the processes' runs together equal the unsplit model's, which ``known`` remembers."""
    got = merged(runs)
    known = {} if known is None else known
    what = case.kind, case.microbatches, case.steps
    want = known.get(what) or known.setdefault(what, wanted(case, seed, got.initial))
    assert reference.distance(got.initial, want.initial) == 0.0, f"{case}: other weights at the start"
    for name in ("loss", "gradients", "summed", "evaluated", "outputs", "final"):
        a, b = getattr(got, name), getattr(want, name)
        error = reference.distance(*((a, b) if isinstance(a, dict) else ({name: a}, {name: b})))
        assert error <= TOLERANCE, f"{case}: {name} differ by {error:.2e}"


def same_bits(a: Any, b: Any) -> bool:
    """Whether two results, nested tuples and dicts of tensors, are equal bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return bool(a == b)


def _gradients(pipe: pk.Pipeline) -> dict[str, Any]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in pipe.named_parameters()}


def _everything(pipe: pk.Pipeline) -> tuple[Any, ...]:
    return _gradients(pipe), _copies(pipe.state_dict()), torch.get_rng_state()


def _copies(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def _union(columns: list[dict[str, Any]]) -> dict[str, Any]:
    union: dict[str, Any] = {}
    for column in columns:
        for name, value in column.items():
            assert name not in union or same_bits(union[name], value), f"two ranks hold different copies of {name}"
            union[name] = value
    return union
