"""Float32: a pipeline is as near to float64 as the unsplit module is, whatever the order in which it adds up.

Of layers that are 32 wide: where the input of a product is narrower, MKL adds weight work that was put off to the
gradient within the product's own sum, entry by entry, which has up to three times the error of a sum of products.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from tests.launch import launch, values
from tests.runtime import reference
from tests.runtime.models import Batch, token_loss, tokens
from tests.runtime.parity import Case, allowed
from tests.runtime.payloads import TYING, WAYS, carrying
from tests.runtime.step import gradients, union
from tests.runtime.test_parity import GRID, MICROBATCHES, SCHEDULES

BATCHES, WIDTH = 8, 32
KINDS = {f"{payload}, {tying}": (payload, tying) for payload, tying in product(WAYS, TYING)}


class Errors(NamedTuple):
    """Of all gradients together, and of the loss: square sums over the batches."""

    gradient: float
    loss: float


def _model(kind: str, seed: int, dtype: torch.dtype) -> nn.Module:
    """Weights that float32 holds exactly."""
    torch.manual_seed(seed)
    return carrying(*KINDS[kind], WIDTH).to(dtype)


def _batches(seed: int, samples: int) -> list[Batch]:
    torch.manual_seed(seed + 1)
    return [tokens(samples) for _ in range(BATCHES)]


Steps = list[tuple[Tensor, dict[str, Any]]]  # loss and gradients of each batch


def _unsplit(kind: str, seed: int, microbatches: int, dtype: torch.dtype) -> Steps:
    model, steps = _model(kind, seed, dtype), []
    for batch in _batches(seed, 2 * microbatches):
        model.zero_grad()
        loss = reference.step(model, token_loss, *batch, microbatches)
        steps.append((loss.to(dtype), reference.gradients(model)))
    return steps


def _pipeline(case: Case, seed: int) -> Steps:
    options: dict[str, Any] = {"microbatches": case.microbatches, "ranks": case.ranks, "schedule": case.schedule}
    model, steps = _model(case.kind, seed, torch.float32), []
    with pk.Pipeline(model, loss_fn=token_loss, transport=case.transport, **options) as pipe:
        for batch in _batches(seed, 2 * case.microbatches):
            for parameter in pipe.parameters():
                parameter.grad = None
            steps.append((pipe.train_step(*batch), gradients(pipe)))
    return steps


def _errors(got: Steps, want: Steps) -> Errors:
    gradient = loss = 0.0
    for (a, grads), (b, exact) in zip(got, want, strict=True):
        assert grads.keys() == exact.keys()
        pairs = [(grads[name], value) for name, value in exact.items() if value is not None]
        gradient += sum(float((one.double() - other).square().sum()) for one, other in pairs)
        loss += float((a.double() - b).square())
    return Errors(gradient, loss)


def _prove(case: Case, seed: int, ranks: list[Steps]) -> None:
    steps = [(row[0][0], union([grads for _, grads in row])) for row in zip(*ranks, strict=True)]
    exact = _unsplit(case.kind, seed, case.microbatches, torch.float64)
    own = _errors(_unsplit(case.kind, seed, case.microbatches, torch.float32), exact)
    got = _errors(steps, exact)
    assert own.gradient > 0
    rounding = sum((float(loss) * 2.0**-24) ** 2 for loss, _ in exact)  # no float32 need be nearer than this
    bounds = Errors(own.gradient, max(own.loss, rounding))
    for name, a, b in zip(Errors._fields, got, bounds, strict=True):
        assert a <= 4 * b, f"{case}: the {name}'s error is {(a / b) ** 0.5:.2f} times the unsplit module's own"


def _cases(grid: Iterable[tuple[str, int, int]], transport: str) -> list[Case]:
    """The kinds of model in turn."""
    kinds = list(KINDS)
    cases = [Case(kinds[(4 * i + i // 3) % len(kinds)], *row, transport=transport) for i, row in enumerate(grid)]
    return [case for case in cases if allowed(case)]


SAMPLE = [(schedule, 2 + i % 2, (3, 8, 5)[i % 3]) for i, schedule in enumerate(SCHEDULES)]


@pytest.mark.parametrize("case", _cases(SAMPLE, "local"), ids=str)
def test_at_most_twice_the_error_of_the_unsplit_module(case: Case, seed: int) -> None:
    _prove(case, seed, [_pipeline(case, seed)])


def _all(cases: list[Case], seed: int) -> list[Steps]:
    return [_pipeline(case, seed) for case in cases]


def test_among_processes(seed: int) -> None:
    cases = _cases([(schedule, 2, 3) for schedule in ("1f1b", "zb-h1", "zb-v")], "auto")
    for case, *ranks in zip(cases, *values(launch(_all, 2, cases, seed)), strict=True):
        _prove(case, seed, list(ranks))


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_whole_grid(schedule: str, seed: int) -> None:
    """Every number of ranks and micro-batches with every way of tying; the kinds of value in turn."""
    grid = [row for row in GRID if row[0] == schedule]
    for tying, (i, row) in product(TYING, enumerate(grid)):
        payload = list(WAYS)[(i + i // len(MICROBATCHES)) % len(WAYS)]
        case = Case(f"{payload}, {tying}", *row, transport="local")
        if allowed(case):
            _prove(case, seed, [_pipeline(case, seed)])
