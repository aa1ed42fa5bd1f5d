"""Tensor parallelism inside a stage: gradients, losses and states of the unsplit model, on any mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel

import pipekern as pk
from pipekern.parallel.tensor import local, whole
from tests.launch import launch, values
from tests.runtime import reference
from tests.runtime.divided import KINDS
from tests.runtime.dividing import Case, prove
from tests.runtime.step import make_seeded, union


def test_two_stages_in_two_parts(seed: int) -> None:
    """Each kind of model; schedules with several chunks a rank, and those that put weight work off."""
    schedules = ("1f1b", "interleaved-1f1b", "zb-h1", "zb-v")
    kinds = [kind for kind in KINDS if kind != "qwen3"]
    prove([Case(kind, {"pp": 2, "tp": 2}, schedules[i % 4]) for i, kind in enumerate(kinds)], seed)


def test_two_replicas_in_two_parts(seed: int) -> None:
    mesh = {"dp": 2, "tp": 2}
    prove([Case("attention", mesh, recompute="full"), Case("tied", mesh), Case("qwen3", mesh)], seed)


MESHES = [{"pp": pp, "dp": dp, "tp": 2} for pp in (1, 2) for dp in (1, 2)]


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-1f1b", "zb-v"])
def test_whole_grid(mesh: dict[str, int], schedule: str, seed: int) -> None:
    prove([Case(kind, mesh, schedule) for kind in KINDS], seed)


def _same_after_loading(seed: int) -> None:
    """State is whole on every rank, and loads."""
    kind = KINDS["ends"]
    model = make_seeded(kind.build, seed)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {"mesh": {"pp": 2, "tp": 2}, "tensor_parallel": kind.plan}
    with pk.Pipeline(model, loss_fn=kind.loss_fn, microbatches=2, **options) as pipe:
        state = pipe.state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in state.items())
        pipe.load_state_dict({name: value + 1 for name, value in wanted.items()})
        assert all(torch.equal(value, wanted[name] + 1) for name, value in pipe.state_dict().items())
        kinds = {name: isinstance(p, DTensor) for name, p in pipe.named_parameters()}
        assert all(there == ("norm" not in name) for name, there in kinds.items()), kinds


def test_state_is_whole_and_loads(seed: int) -> None:
    values(launch(_same_after_loading, 4, seed))


def _verified(kind: str, dropout: float) -> float:
    torch.manual_seed(3)
    model = KINDS[kind].build().double()
    for name, module in model.named_modules():
        if name.endswith("outer"):
            module.p = dropout
    batch = KINDS[kind].batch(4)
    options: dict[str, Any] = {"mesh": {"pp": 2, "tp": 2}, "tensor_parallel": KINDS[kind].plan}
    with pk.Pipeline(model, loss_fn=KINDS[kind].loss_fn, microbatches=2, **options) as pipe:
        found = pk.verify(pipe, *batch)
        again = pk.verify(pipe, *batch)
        assert found.errors.keys() == again.errors.keys() == model.state_dict().keys()
        return max(found.max_error, found.loss_error, again.max_error)


@pytest.mark.parametrize("kind", ["perceptrons", "tied"])
def test_verify_and_dropout_of_whole_values(kind: str) -> None:
    """The same numbers are drawn as by the unsplit model."""
    assert max(values(launch(_verified, 4, kind, 0.5))) <= 1e-12


def _steps(fused: bool) -> dict[str, Tensor]:
    torch.manual_seed(3)
    kind = KINDS["perceptrons"]
    model = kind.build().float()
    options: dict[str, Any] = {"mesh": {"tp": 2}, "tensor_parallel": kind.plan}
    with pk.Pipeline(model, loss_fn=kind.loss_fn, microbatches=2, **options) as pipe:
        cls, own = (pk.optim.AdamW, {"max_norm": 0.5}) if fused else (torch.optim.AdamW, {})
        optimizer = pipe.optimizer(cls, lr=1e-2, **own)
        for _ in range(4):
            optimizer.zero_grad()
            pipe.train_step(*(part.float() for part in kind.batch(4)))
            if not fused:
                pipe.clip_grad_norm_(0.5)
            optimizer.step()
        return {name: value.clone() for name, value in pipe.state_dict().items()}


def test_the_fused_optimizer_takes_parts() -> None:
    one, other = (union(values(launch(_steps, 2, fused))) for fused in (True, False))
    assert reference.distance(one, other) <= 1e-6


def _not_finite(policy: str) -> tuple[str, int]:
    kind = KINDS["perceptrons"]
    torch.manual_seed(0)
    options: dict[str, Any] = {"mesh": {"pp": 2, "tp": 2}, "tensor_parallel": kind.plan, "on_nonfinite": policy}
    with pk.Pipeline(kind.build().double(), loss_fn=kind.loss_fn, microbatches=2, **options) as pipe:
        batch = kind.batch(4)
        pipe.train_step(*batch)
        with torch.no_grad():
            for name, p in pipe.named_parameters():
                if name == "2.up.weight" and pipe._parts.place.tp == 1:
                    local(p)[0, 0] = float("nan")
        before = {name: whole(p.grad).clone() for name, p in pipe.named_parameters() if p.grad is not None}
        try:
            pipe.train_step(*batch)
        except pk.NumericsError as error:
            return str(error), -1
        return "", sum(torch.equal(whole(p.grad), before[n]) for n, p in pipe.named_parameters() if p.grad is not None)


def test_what_is_not_finite_on_one_part_is_seen_by_all() -> None:
    messages = [text for text, _ in values(launch(_not_finite, 4, "raise"))]
    assert len(set(messages)) == 1
    assert "the parameter 2.up.weight is not" in messages[0]
    assert [count for _, count in values(launch(_not_finite, 4, "skip"))] == [12] * 4


def _refused(mesh: dict[str, int] | None, options: dict[str, Any]) -> str:
    kind = KINDS["attention"]
    with pytest.raises(pk.ConfigError) as caught:
        pk.Pipeline(kind.build(), loss_fn=kind.loss_fn, microbatches=2, mesh=mesh, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("mesh", "options", "text"),
    [
        ({"tp": 2}, {}, "mesh has tp=2, and tensor_parallel does not say which modules"),
        ({"tp": 2}, {"tensor_parallel": {"layers.*.up": ColwiseParallel()}}, "'layers.*.up' matches no module"),
        ({"tp": 2}, {"tensor_parallel": {"blocks.*.up": ColwiseParallel()}, "fuse_loss": True}, "fuse_loss=True with"),
    ],
)
def test_refusals(mesh: dict[str, int], options: dict[str, Any], text: str) -> None:
    assert all(text in message for message in values(launch(_refused, 2, mesh, options)))


def test_one_process_takes_a_plan_and_divides_nothing() -> None:
    kind = KINDS["attention"]
    with pk.Pipeline(kind.build(), loss_fn=kind.loss_fn, microbatches=2, tensor_parallel=kind.plan) as pipe:
        assert not any(isinstance(p, DTensor) for p in pipe.parameters())


def _continued(folder: str, seed: int, mesh: dict[str, int], begins: bool) -> dict[str, Tensor]:
    """Two steps and a checkpoint, or none and its state; then one step more."""
    kind = KINDS["ends"]
    torch.manual_seed(seed)
    batches = [kind.batch(4) for _ in range(3)]
    model = make_seeded(kind.build, seed if begins else seed + 1)
    options: dict[str, Any] = {"mesh": mesh, "tensor_parallel": kind.plan, "seed": seed}
    with pk.Pipeline(model, loss_fn=kind.loss_fn, microbatches=2, **options) as pipe:
        optimizer = pipe.optimizer(torch.optim.AdamW, lr=1e-2, eps=1e-2)
        for batch in batches[:2] if begins else ():
            optimizer.zero_grad()
            pipe.train_step(*batch)
            optimizer.step()
        if begins:
            pipe.save(folder)
        else:
            pipe.load(folder)
        optimizer.zero_grad()
        pipe.train_step(*batches[2])
        optimizer.step()
        return {name: value.clone() for name, value in pipe.state_dict().items()}


@pytest.mark.parametrize("meshes", [[{"tp": 2}, {"pp": 2}], [{"pp": 2}, {"tp": 2}]], ids=str)
def test_a_checkpoint_is_continued_on_another_mesh(meshes: list[dict[str, int]], tmp_path: Path, seed: int) -> None:
    folder = str(tmp_path / "saved")
    wanted, got = (union(values(launch(_continued, 2, folder, seed, m, i == 0))) for i, m in enumerate(meshes))
    assert reference.distance(got, wanted) <= 1e-12
