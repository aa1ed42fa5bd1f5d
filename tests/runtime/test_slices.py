"""Messages in slices between hosts, of what all tensor-parallel parts have alike: fewer bytes, the same training."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pipekern as pk
from pipekern.runtime.outgoing import BACKWARD_TAG, FORWARD_TAG
from pipekern.transport import world as world_module
from pipekern.transport.value import distinct, tensors
from tests.launch import launch, values
from tests.runtime import reference
from tests.runtime.divided import KINDS, TIME, WIDTH
from tests.runtime.dividing import gradients
from tests.runtime.step import make_seeded, union

SAMPLES, MICROBATCHES = 32, 4
MESSAGE = SAMPLES // MICROBATCHES * TIME * WIDTH * 8  # bytes


class Case(NamedTuple):
    kind: str
    schedule: str = "1f1b"
    hosts: int = 2
    recompute: str = "none"
    split: tuple[int, ...] | None = None


class Trained(NamedTuple):
    loss: Tensor
    gradients: dict[str, Any]
    evaluated: Tensor
    sent: dict[int, list[int]]  # bytes of each message, forward and backward


def _train(case: Case, seed: int) -> Trained:
    """Two stages, each on a host that this process says it is on."""
    facts, rank = world_module.identity, int(os.environ["RANK"])
    world_module.identity = lambda: {**facts(), "boot": f"host {rank // 2 % case.hosts}"}
    kind = KINDS[case.kind]
    torch.manual_seed(seed)
    batch = kind.batch(SAMPLES)
    options: dict[str, Any] = {"mesh": {"pp": 2, "tp": 2}, "tensor_parallel": kind.plan, "schedule": case.schedule}
    options |= {"recompute": case.recompute, "split": case.split}
    model = make_seeded(kind.build, seed)
    try:
        with pk.Pipeline(model, loss_fn=kind.loss_fn, microbatches=MICROBATCHES, timeout=30.0, **options) as pipe:
            sent = _watched(pipe)
            loss = pipe.train_step(*batch)
            return Trained(loss, gradients(pipe), pipe.eval_step(*batch), sent)
    finally:
        world_module.identity = facts


def _watched(pipe: pk.Pipeline) -> dict[int, list[int]]:
    sent: dict[int, list[int]] = {FORWARD_TAG: [], BACKWARD_TAG: []}
    outgoing = pipe._parts.outgoing
    send = outgoing.send

    def counted(sender: Any, tag: int, value: Any, digest: int = 0, given: bool = False) -> None:
        kind = tag >> 56 << 56
        if kind in sent:
            sent[kind].append(sum(tensor.nbytes for tensor in distinct(tensors(value))))
        send(sender, tag, value, digest, given)

    outgoing.send = counted  # type: ignore[method-assign]
    return sent


def _all(cases: list[Case], seed: int) -> list[Trained]:
    return [_train(case, seed) for case in cases]


def trained(cases: list[Case], seed: int) -> list[list[Trained]]:
    """By case, of each process; equal to the unsplit model's."""
    rows = list(zip(*values(launch(_all, 4, cases, seed, timeout=120.0)), strict=True))
    for case, runs in zip(cases, rows, strict=True):
        kind, model = KINDS[case.kind], make_seeded(KINDS[case.kind].build, seed)
        torch.manual_seed(seed)
        batch = kind.batch(SAMPLES)
        loss = reference.step(model, kind.loss_fn, *batch)
        assert all(abs(float(run.loss) - float(loss)) <= 1e-12 for run in runs), case
        assert all(abs(float(run.evaluated) - float(loss)) <= 1e-12 for run in runs), case
        error = reference.distance(union([run.gradients for run in runs]), reference.gradients(model))
        assert error <= 1e-12, f"{case}: gradients differ by {error:.2e}"
    return [list(runs) for runs in rows]


def test_half_of_each_message_goes_between_hosts(seed: int) -> None:
    """On one host all of it: there the parts would only send more."""
    cases = [Case("perceptrons"), Case("perceptrons", hosts=1), Case("perceptrons", "zb-v", recompute="full")]
    apart, together, chunks = trained(cases, seed)
    for runs, size in ((apart, MESSAGE // 2), (together, MESSAGE)):
        for rank, run in enumerate(runs):
            first = rank < 2
            assert run.sent == {FORWARD_TAG: [size] * 4 * first, BACKWARD_TAG: [size] * 4 * (not first)}
    assert {size for run in chunks for row in run.sent.values() for size in row} == {MESSAGE // 2}


def test_what_is_in_parts_goes_as_it_is(seed: int) -> None:
    """A part of the sequence each; and what comes out of layers that have got parts."""
    cases = [Case("sequence"), Case("layers", split=(2, 6)), Case("layers", "zb-v", split=(2, 1, 2, 3))]
    sequence, inside, chunks = trained(cases, seed)
    assert {size for run in sequence for row in run.sent.values() for size in row} == {MESSAGE // 2}
    assert {size for run in inside for row in run.sent.values() for size in row} == {2 * MESSAGE}
    assert {size for run in chunks for row in run.sent.values() for size in row} == {2 * MESSAGE, MESSAGE // 2}


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-1f1b", "zb-h1", "zb-v"])
def test_every_kind(schedule: str, seed: int) -> None:
    for kind in KINDS:
        trained([Case(kind, schedule)], seed)
