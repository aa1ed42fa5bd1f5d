"""Cases of the proof of tensor parallelism: trained in parts on a mesh, and by the unsplit model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import pipekern as pk
from pipekern.parallel.tensor import whole
from tests.launch import launch, values
from tests.runtime import reference
from tests.runtime.divided import KINDS
from tests.runtime.step import make_seeded, union


class Case(NamedTuple):
    """What is trained, on what mesh, and how."""

    kind: str
    mesh: dict[str, int]
    schedule: str = "1f1b"
    recompute: str = "none"
    zero: int = 0

    @property
    def processes(self) -> int:
        return self.mesh.get("pp", 1) * self.mesh.get("dp", 1) * self.mesh.get("tp", 1)

    def __str__(self) -> str:
        return f"{self.kind} {self.mesh} {self.schedule} {self.recompute} zero={self.zero}"


class Trained(NamedTuple):
    loss: Tensor
    gradients: dict[str, Any]
    norm: Tensor
    final: dict[str, Tensor]
    dp: int


SAMPLES, STEPS = 8, 3


def gradients(pipe: pk.Pipeline) -> dict[str, Any]:
    """This process's, whole: put together over parts and replicas; collective."""
    store, named = pipe._parts.store, dict(pipe.named_parameters())
    found: dict[str, Tensor | None] = {name: p.grad for name, p in named.items()}
    if store is not None and pipe._parts.zero:
        found = {**store.whole(lambda piece: piece.parameter.grad, of_gradients=True)}
    return {name: None if value is None else whole(value).clone() for name, value in found.items()}


def train(case: Case, seed: int) -> Trained:
    """By the pipeline: the gradients of one step, to which the next one adds, then steps of AdamW with clipping."""
    kind = KINDS[case.kind]
    model = make_seeded(kind.build, seed)
    torch.manual_seed(seed + 1)
    batches = [kind.batch(SAMPLES) for _ in range(STEPS)]
    dp = case.mesh.get("dp", 1)
    options: dict[str, Any] = {"mesh": case.mesh, "schedule": case.schedule, "recompute": case.recompute}
    options |= {"tensor_parallel": kind.plan, "zero": case.zero}
    with pk.Pipeline(model, loss_fn=kind.loss_fn, microbatches=4 // dp, seed=seed, timeout=30.0, **options) as pipe:
        place = pipe._parts.place
        own = [[part.tensor_split(dp)[place.dp] for part in batch] for batch in batches]
        loss = pipe.train_step(*own[0])
        first = gradients(pipe)
        optimizer = pipe.optimizer(torch.optim.AdamW, lr=1e-2, eps=1e-2)
        for batch in own[1:]:
            pipe.train_step(*batch)
            norm = pipe.clip_grad_norm_(0.1)
            optimizer.step()
            optimizer.zero_grad()
        return Trained(loss, first, norm, {n: v.clone() for n, v in pipe.state_dict().items()}, place.dp)


def wanted(case: Case, seed: int) -> Trained:
    """By the unsplit model."""
    kind = KINDS[case.kind]
    model = make_seeded(kind.build, seed)
    torch.manual_seed(seed + 1)
    batches = [kind.batch(SAMPLES) for _ in range(STEPS)]
    loss = reference.step(model, kind.loss_fn, *batches[0])
    gradients = reference.gradients(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2)
    for batch in batches[1:]:
        reference.step(model, kind.loss_fn, *batch)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return Trained(loss, gradients, norm, dict(model.state_dict()), 0)


def _all(cases: list[Case], seed: int) -> list[Trained]:
    return [train(case, seed) for case in cases]


def prove(cases: list[Case], seed: int) -> None:
    """All of ``cases``, on meshes of the same size."""
    for case, *runs in zip(cases, *values(launch(_all, cases[0].processes, cases, seed, timeout=120.0)), strict=True):
        want = wanted(case, seed)
        for name in ("loss", "norm"):
            got = [getattr(run, name) for run in runs]
            assert all(torch.equal(one, got[0]) for one in got), f"{case}: {name} of the processes: {got}"
            exact = float(getattr(want, name))
            assert abs(float(got[0]) - exact) <= 1e-12 * max(1.0, exact), f"{case}: {name}"
        for name in ("gradients", "final"):
            error = reference.distance(union([getattr(run, name) for run in runs]), getattr(want, name))
            assert error <= 1e-12, f"{case}: {name} differ by {error:.2e}"
