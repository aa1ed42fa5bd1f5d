"""Replicas of a pipeline train as the unsplit model does over all their batches, within 1e-12 in float64."""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from pipekern.trace.timeline import Timeline
from tests.launch import launch, values
from tests.runtime.models import KINDS as MODELS
from tests.runtime.models import batches
from tests.runtime.parity import same_bits
from tests.runtime.reference import distance
from tests.runtime.replicated import KINDS, Case, Trained, compare, train
from tests.runtime.step import make_seeded, union

SCHEDULES = ("1f1b", "interleaved-1f1b", "zb-v")
PLACES = ((1, 1), (1, 2), (2, 1), (2, 2))  # pipeline ranks, replicas
GRID = [
    Case(k, s, p[0], p[1], z) for k, p, s, z in product(KINDS, PLACES, SCHEDULES, range(4)) if s == "1f1b" or p[0] > 1
]


def _train_all(cases: list[Case], seed: int) -> list[Trained]:
    runs = []
    for case in cases:
        try:
            runs.append(train(case, seed))
        except Exception as error:
            raise AssertionError(f"{case} failed: {error}") from error
    return runs


def _prove(cases: list[Case], seed: int) -> None:
    """All of the same place."""
    runs = values(launch(_train_all, cases[0].pp * cases[0].dp, cases, seed, timeout=500))
    for case, *of_case in zip(cases, *runs, strict=True):
        compare(case, of_case, seed)


@pytest.mark.parametrize("place", PLACES)
def test_sample(place: tuple[int, int], seed: int) -> None:
    """Every kind of model with every zero, the schedules in turn."""
    cases = [case for case in GRID if (case.pp, case.dp) == place]
    step = 3 if place[0] > 1 else 1
    turn = [case for i, case in enumerate(cases) if i % step == (i // 12 + i // 4) % step]
    _prove(turn if place[1] > 1 else turn[::5], seed)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("place", "kind"), list(product(PLACES, KINDS)))
def test_whole_grid(place: tuple[int, int], kind: str, seed: int) -> None:
    _prove([case for case in GRID if (case.pp, case.dp) == place and case.kind == kind], seed)


@pytest.mark.parametrize("zero", [0, 2])
def test_twenty_steps(zero: int, seed: int) -> None:
    _prove([Case("mean", "1f1b", 2, 2, zero, optimizer, steps=20) for optimizer in ("adamw", "sgd")], seed)


def dropping() -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Dropout(0.4))))


def _with_dropout(pp: int, dp: int, zero: int, seed: int) -> dict[str, Any]:
    """The gradients of two steps of four micro-batches in all."""
    samples = 12
    replica = int(os.environ.get("RANK", "0")) // pp
    mesh = {"dp": dp, "pp": pp} if dp > 1 else None
    with pk.Pipeline(
        make_seeded(dropping, seed), loss_fn=F.mse_loss, microbatches=4 // dp, ranks=pp, mesh=mesh, zero=zero, seed=seed
    ) as pipe:
        for step in range(2):
            torch.manual_seed(seed + step)
            x = torch.randn(samples, 6, dtype=torch.float64).tensor_split(dp)[replica]
            pipe.train_step(x, x)
        return {name: p.grad for name, p in pipe.named_parameters()}


def test_dropout_counts_micro_batches_over_the_replicas(seed: int) -> None:
    """Two replicas of two micro-batches draw what one pipeline of four draws."""
    want = _with_dropout(1, 1, 0, seed)
    for pp in (1, 2):
        got = union(values(launch(_with_dropout, 2 * pp, pp, 2, 0, seed)))
        assert distance(got, want) <= 1e-12


def _volume_and_timeline(zero: int, schedule: str, steps: int) -> dict[str, Any]:
    """Of float64 layers whose sizes two replicas divide."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).double()
    with pk.Pipeline(
        net, loss_fn=F.mse_loss, microbatches=4, ranks=2, schedule=schedule, mesh={"dp": 2, "pp": 2}, zero=zero
    ) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
        x = torch.randn(8, 64, dtype=torch.float64)
        for _ in range(steps):
            optimizer.zero_grad()
            pipe.train_step(x, x)
            optimizer.step()
        timeline = pipe.timeline()
        assert pipe._parts.replicas is not None
        return {"sent": dict(pipe._parts.replicas.sent), "timeline": timeline.to_dict()}


def _volumes_and_timelines(schedule: str, steps: int) -> list[dict[str, Any]]:
    return [_volume_and_timeline(zero, schedule, steps) for zero in range(4)]


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_volume_and_timeline(schedule: str) -> None:
    """Bytes as a ring sends them: those of every zero are those of plain data parallelism. A timeline has each sum and
    gather, from where it began; a sum begins when its stage's weight work has ended.
    """
    steps, share = 3, 8 * 2 * (64 * 64 + 64)  # of two layers a rank, in float64
    for of_rank in values(launch(_volumes_and_timelines, 4, schedule, steps)):
        for zero, found in enumerate(of_rank):
            assert found["sent"] == ({"reduce": steps * share, "gather": 0} if not zero else
                                     {"reduce": steps * share // 2, "gather": steps * share // 2})  # fmt: skip
            timeline = Timeline.from_dict(found["timeline"])
            stages = 2 if schedule == "1f1b" else 4
            for op, there in (("REDUCE", True), ("GATHER", zero > 0)):
                spans = [span for span in timeline.spans if span.op == op]
                assert sorted(span.stage for span in spans) == (list(range(stages)) if there else [])
                assert all(span.end > span.start for span in spans)
            for span in timeline.spans:
                if span.op == "REDUCE":
                    work = [
                        one for one in timeline.of_rank(span.rank) if one.op in ("W", "BW") and one.stage == span.stage
                    ]
                    assert len(work) == 4 and span.start >= max(one.end for one in work)
                if span.op == "GATHER":
                    forwards = [one for one in timeline.of_rank(span.rank) if one.op == "F" and one.stage == span.stage]
                    assert span.start <= min(one.start for one in forwards)


def _continued(pp: int, zero: int, precision: str | None, seed: int) -> list[Tensor]:
    """A prompt that differs by replica, before and after a step."""
    replica = int(os.environ.get("RANK", "0")) // pp
    model = make_seeded(MODELS["tied gpt"].build, seed)
    if precision is not None:
        model = model.float()
    torch.manual_seed(seed)
    prompts = torch.randint(1, 11, (2, 2, 3))
    data = [batches(MODELS["tied gpt"], seed, 4, 1)[0] for _ in range(2)]
    mesh = {"dp": 2, "pp": pp}
    with pk.Pipeline(
        model, loss_fn=MODELS["tied gpt"].loss_fn, microbatches=2, mesh=mesh, zero=zero, precision=precision
    ) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.5)
        first = pipe.generate(prompts[replica], 4)
        pipe.train_step(*data[replica])
        optimizer.step()
        second = pipe.generate(prompts[replica], 4)
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        return [first, second]


def test_each_replica_continues_its_own_text(seed: int) -> None:
    """With the weights of the last step, wherever they are."""
    want = values(launch(_continued, 2, 1, 0, None, seed))
    for pp, zero in ((1, 3), (2, 1), (2, 3)):
        got = values(launch(_continued, 2 * pp, pp, zero, None, seed))
        assert all(same_bits(tuple(texts), tuple(want[rank // pp])) for rank, texts in enumerate(got))


def _kept(zero: int, seed: int) -> bool:
    """Weights that the whole model's state has, loaded and given again, and gradients that none has."""
    state = make_seeded(KINDS["tied"].build, seed).state_dict()
    with pk.Pipeline(
        make_seeded(KINDS["tied"].build, seed + 1), loss_fn=KINDS["tied"].loss_fn, microbatches=2, mesh={"dp": 2},
        zero=zero,
    ) as pipe:  # fmt: skip
        pipe.load_state_dict(state)
        return all(torch.equal(value, state[name]) for name, value in pipe.state_dict().items())


@pytest.mark.parametrize("zero", range(4))
def test_state_is_whole(zero: int, seed: int) -> None:
    assert all(values(launch(_kept, 4, zero, seed)))


def _different(what: str) -> str:
    rank = int(os.environ["RANK"])
    options: dict[str, Any] = {}
    if what in ("zero", "precision") and rank:
        options[what] = {"zero": 1, "precision": "bf16"}[what]
    if what == "mesh":
        options["mesh"] = {"dp": 2} if rank else {"pp": 1, "dp": 3}
    if what == "order":
        options["mesh"] = {"dp": 2, "pp": 2} if rank % 2 else {"pp": 2, "dp": 2}
    try:
        pk.Pipeline(
            nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            loss_fn=F.mse_loss,
            microbatches=1,
            **{"mesh": {"dp": 2}, **options},
        )
    except pk.PipekernError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("what", ["zero", "precision", "mesh", "order"])
def test_ranks_that_were_given_different_ones(what: str) -> None:
    """Before they form groups, in which they would wait for others than those that wait for them."""
    texts = values(launch(_different, 4 if what == "order" else 2, what, timeout=40.0))
    assert all(("mesh" if what == "order" else what) in text for text in texts), texts


class Scale(nn.Module):
    """A product with a weight of one number."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def scaled() -> nn.Sequential:
    weight = nn.Parameter(torch.full((1,), 1.5))
    return nn.Sequential(Scale(weight), nn.Linear(4, 4), nn.Linear(4, 4), Scale(weight)).float()


def _scaled(zero: int, seed: int) -> dict[str, Any]:
    """Two steps of the fused optimizer, which clips, and a norm."""
    replica = int(os.environ.get("RANK", "0")) // 2
    torch.manual_seed(seed)
    net, x = scaled(), torch.randn(8, 4)
    mesh = {"dp": 2, "pp": 2} if zero >= 0 else None
    x = x.tensor_split(2)[replica] if zero >= 0 else x
    with pk.Pipeline(net, loss_fn=F.mse_loss, microbatches=2, ranks=2, mesh=mesh, zero=max(zero, 0)) as pipe:
        optimizer = pipe.optimizer(pk.optim.AdamW, lr=1e-2, max_norm=0.1)
        norms = []
        for _ in range(2):
            pipe.train_step(x, x)
            norms.append(pipe.clip_grad_norm_(float("inf")).float())
            optimizer.step()
            assert isinstance(optimizer, pk.optim.AdamW)
            norms.append(optimizer.norm.clone())
            optimizer.zero_grad()
        return {"norms": torch.stack(norms), **pipe.state_dict()}


def test_a_weight_that_is_in_one_shard_alone(seed: int) -> None:
    """And on two ranks: it counts once."""
    want = _scaled(-1, seed)
    for zero in range(4):
        got = union(values(launch(_scaled, 4, zero, seed)))
        assert distance(got, want) <= 1e-5, zero
