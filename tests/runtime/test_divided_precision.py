"""bf16 and fp16 in tensor-parallel parts: masters of a part's own numbers, one decision, one norm."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn import functional as F

import pipekern as pk
from pipekern.parallel.tensor import local
from tests.launch import launch, values
from tests.runtime import reference
from tests.runtime.divided import KINDS
from tests.runtime.dividing import gradients
from tests.runtime.low_precision import DTYPES, Low, difference
from tests.runtime.models import Batch
from tests.runtime.parity import same_bits
from tests.runtime.step import union

PARTS = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class Two(nn.Module):
    """Four rows of ``up`` and four columns of ``down``."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def _two() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(Two())


def _golden(precision: str) -> None:
    model = _two()
    before = copy.deepcopy(model.state_dict())
    plan = {f"0.{name}": style for name, style in PARTS.items()}
    options: dict[str, Any] = {"mesh": {"tp": 2}, "tensor_parallel": plan, "precision": precision}
    with pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=2, **options) as pipe:
        part = pipe._parts.place.tp
        named = dict(pipe.named_parameters())
        rows, columns = named["0.up.weight"], named["0.down.weight"]
        assert torch.equal(local(rows), before["0.up.weight"].chunk(2)[part])
        assert torch.equal(local(columns), before["0.down.weight"].chunk(2, dim=1)[part])
        optimizer = pipe.optimizer(torch.optim.SGD, lr=1.0)
        optimizer.step()  # no gradient yet
        pipe.train_step(torch.randn(4, 2), torch.randn(4, 2))
        for name, p in named.items():
            assert isinstance(p, DTensor) and isinstance(p.grad, DTensor)
            assert p.dtype is p.grad.dtype is torch.float32
            (weight,) = [w for unit in pipe._parts.units() for n, w in unit.named_parameters() if n == name]
            assert weight.dtype is local(weight).dtype is DTYPES[precision]
            assert torch.equal(local(weight), local(p).to(DTYPES[precision]))
        wanted = {name: local(p.detach()) - local(p.grad) for name, p in named.items() if p.grad is not None}
        optimizer.step()
        assert all(torch.equal(local(p), wanted[name]) for name, p in named.items())
        state = pipe.state_dict()
        assert torch.equal(state["0.up.weight"].chunk(2)[part], wanted["0.up.weight"])
        pipe.load_state_dict(before)
        assert same_bits(pipe.state_dict(), before)
        pipe.eval_step(torch.randn(4, 2))
        weights = {n: local(w.detach()) for unit in pipe._parts.units() for n, w in unit.named_parameters()}
        assert torch.equal(weights["0.up.weight"], before["0.up.weight"].chunk(2)[part].to(DTYPES[precision]))


@pytest.mark.parametrize("precision", DTYPES)
def test_golden_two_layers_in_two_parts(precision: str) -> None:
    """Masters, gradients, what the stage computes with, and what is loaded are those of the part's own numbers."""
    values(launch(_golden, 2, precision))


class Case(NamedTuple):
    """What is trained, on what mesh, and how."""

    kind: str
    precision: str
    mesh: dict[str, int]
    zero: int = 0
    max_norm: float | None = None
    schedule: str = "1f1b"

    @property
    def processes(self) -> int:
        return self.mesh.get("pp", 1) * self.mesh.get("dp", 1) * self.mesh.get("tp", 1)


class Trained(NamedTuple):
    loss: Tensor
    gradients: dict[str, Any]  # after one step
    norm: Tensor
    last: Tensor
    final: dict[str, Any]


SCALE, STEPS = 256.0, 4


def _data(kind: str, seed: int) -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(seed)
    model = KINDS[kind].build()
    batches = [Batch(*(v.float() if v.is_floating_point() else v for v in KINDS[kind].batch(8))) for _ in range(STEPS)]
    return model, batches


def _train(case: Case, seed: int) -> Trained:
    kind, (model, batches) = KINDS[case.kind], _data(case.kind, seed)
    dp = case.mesh.get("dp", 1)
    scale = pk.optim.LossScale(initial=SCALE) if case.precision == "fp16" else None
    options: dict[str, Any] = {"mesh": case.mesh, "tensor_parallel": kind.plan, "precision": case.precision}
    options |= {"zero": case.zero, "loss_scale": scale, "schedule": case.schedule, "seed": seed}
    with pk.Pipeline(model, loss_fn=kind.loss_fn, microbatches=4 // dp, timeout=30.0, **options) as pipe:
        own = [[part.tensor_split(dp)[pipe._parts.place.dp] for part in batch] for batch in batches]
        loss = pipe.train_step(*own[0])
        first, norm = gradients(pipe), pipe.clip_grad_norm_(float("inf"))
        optimizer = pipe.optimizer(pk.optim.AdamW, lr=1e-2, eps=1e-2, max_norm=case.max_norm)
        for batch in own[1:]:
            optimizer.step()
            optimizer.zero_grad()
            last = pipe.train_step(*batch)
        return Trained(loss, first, norm, last, {name: value.clone() for name, value in pipe.state_dict().items()})


def _all(cases: list[Case], seed: int) -> list[Trained]:
    return [_train(case, seed) for case in cases]


def _trained(cases: list[Case], seed: int) -> list[Trained]:
    """What all processes together have, which agree on the rest; all of ``cases`` on meshes of one size."""
    found = []
    for case, *runs in zip(cases, *values(launch(_all, cases[0].processes, cases, seed, timeout=120)), strict=True):
        for name in ("loss", "norm", "last"):
            assert all(same_bits(getattr(run, name), getattr(runs[0], name)) for run in runs), f"{case}: {name}"
        whole = [union([getattr(run, name) for run in runs]) for name in ("gradients", "final")]
        found.append(Trained(runs[0].loss, whole[0], runs[0].norm, runs[0].last, whole[1]))
    return found


def _distance(got: dict[str, Any], want: dict[str, Any]) -> float:
    """The root of all squared differences, by that of all squares: the largest one has a tail of bad luck."""
    assert got.keys() == want.keys()
    off = sum(float((got[name] - value).double().square().sum()) for name, value in want.items())
    return (off / sum(float(value.double().square().sum()) for value in want.values())) ** 0.5


def _near(case: Case, got: Trained, seed: int) -> None:
    """Fail unless gradients and parameters are as near to float32's as those of the unsplit model in low precision."""
    kind, (model, batches) = KINDS[case.kind], _data(case.kind, seed)
    exact = copy.deepcopy(model)
    scale = SCALE if case.precision == "fp16" else 1.0
    low = Low(model, kind.loss_fn, DTYPES[case.precision], 4, scale)
    low.step(batches[:1])
    reference.step(exact, kind.loss_fn, *batches[0])
    narrow, wide = low.gradients(), reference.gradients(exact)
    error, allowed = _distance(got.gradients, wide), _distance(narrow, wide)
    assert error <= 1.5 * allowed, f"{case}: gradients {error:.1e}, of the unsplit model {allowed:.1e}"
    norm = float(torch.stack([p.grad.norm() for p in exact.parameters() if p.grad is not None]).norm())
    assert abs(float(got.norm) - norm) <= 2 * allowed * norm, f"{case}: norm {float(got.norm)}, wanted {norm}"
    for one, weights in ((low, low.masters), (None, exact)):
        optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-2, eps=1e-2)
        for batch in batches[1:]:
            if case.max_norm is not None:
                nn.utils.clip_grad_norm_(weights.parameters(), case.max_norm)
            optimizer.step()
            optimizer.zero_grad()
            _ = reference.step(exact, kind.loss_fn, *batch) if one is None else one.step([batch])
    wanted = {name: p.detach() for name, p in exact.named_parameters(remove_duplicate=False)}
    own = {name: value for name, value in got.final.items() if name in wanted}
    error, allowed = _distance(own, wanted), _distance(low.weights(), wanted)
    assert error <= 1.5 * allowed, f"{case}: parameters {error:.1e}, of the unsplit model {allowed:.1e}"


@pytest.mark.parametrize("precision", DTYPES)
def test_as_near_as_the_unsplit_model(precision: str, seed: int) -> None:
    cases = [Case(kind, precision, {"tp": 2}, max_norm=0.1) for kind in ("perceptrons", "layers")]
    for case, got in zip(cases, _trained(cases, seed), strict=True):
        _near(case, got, seed)


def _same(one: Trained, other: Trained, case: Case) -> None:
    for name in Trained._fields:
        if not case.zero or (name != "norm" and case.max_norm is None):  # one partial a shard rounds otherwise
            assert same_bits(getattr(one, name), getattr(other, name)), f"{case}: {name}"
    assert difference(one.final, other.final) <= 1e-6
    assert abs(float(one.norm) - float(other.norm)) <= 1e-6 * float(other.norm)


def test_shards_are_the_same_bits(seed: int) -> None:
    """Over the same parts and replicas, for every ``zero``; clipped they are near."""
    for max_norm, zeros in ((None, (0, 1, 3)), (0.1, (0, 2))):
        cases = [Case("perceptrons", "bf16", {"dp": 2, "tp": 2}, zero, max_norm) for zero in zeros]
        first, *rest = _trained(cases, seed)
        for case, one in zip(cases[1:], rest, strict=True):
            _same(one, first, case)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", ["perceptrons", "llama", "tied llama", "qwen3"])
def test_every_mesh(kind: str, precision: str, seed: int) -> None:
    """Stages change no bit, ``zero`` neither; replicas are as near as one. Also tied weights, and whole ones that are
    used on parts.
    """
    for dp in (1, 2):
        cases = [Case(kind, precision, {"pp": 1, "dp": dp, "tp": 2}, zero) for zero in range(4)]
        cut = [case._replace(mesh={**case.mesh, "pp": 2}) for case in cases]
        first, *rest = _trained(cases, seed) + _trained(cut, seed)
        _near(cases[0], first, seed)
        for case, one in zip([*cases, *cut][1:], rest, strict=True):
            _same(one, first, case)


def _overflow(stages: int) -> tuple[list[bool], float, bool]:
    """One product alone, on the second part: of ``up``'s rows there, which are zero, so that all else is finite."""
    torch.manual_seed(0)
    first, second = Two(), Two()
    model = nn.Sequential(first, second)
    with torch.no_grad():
        second.up.weight[2:] = 0
        second.down.weight[:, 2:] = 1000
    plan = {f"*.{name}": style for name, style in PARTS.items()}
    options: dict[str, Any] = {"mesh": {"pp": stages, "tp": 2}, "tensor_parallel": plan, "precision": "fp16"}
    options["loss_scale"] = pk.optim.LossScale(initial=2.0**6)
    with pk.Pipeline(model, loss_fn=nn.MSELoss(reduction="sum"), microbatches=2, **options) as pipe:
        optimizer = pipe.optimizer(pk.optim.AdamW, lr=1e-2)
        before = {name: value.clone() for name, value in pipe.state_dict().items()}
        x = torch.full((4, 2), 4.0)
        pipe.train_step(x, torch.full((4, 2), 10.0))
        gone = [p.grad is None for p in pipe.parameters()]
        optimizer.step()
        assert pipe.loss_scale is not None
        return gone, pipe.loss_scale.value, same_bits(pipe.state_dict(), before)


@pytest.mark.parametrize("stages", [1, 2])
def test_an_overflow_on_one_part_is_left_out_on_all(stages: int) -> None:
    for gone, scale, unchanged in values(launch(_overflow, 2 * stages, stages)):
        assert all(gone) and scale == 2.0**5 and unchanged


def _verified(precision: str) -> float:
    torch.manual_seed(3)
    batch = KINDS["perceptrons"].batch(4)
    options: dict[str, Any] = {"mesh": {"pp": 2, "tp": 2}, "tensor_parallel": KINDS["perceptrons"].plan}
    with pk.Pipeline(
        KINDS["perceptrons"].build(), loss_fn=F.mse_loss, microbatches=2, precision=precision, **options
    ) as pipe:
        found = pk.verify(pipe, *(part.float() for part in batch))
        return max(found.max_error, found.loss_error)


def test_verify(seed: int) -> None:
    """Beside the unsplit model in the same precision."""
    assert 0 < max(values(launch(_verified, 4, "bf16"))) <= 0.05
