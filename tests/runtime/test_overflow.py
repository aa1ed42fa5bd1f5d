"""float16 that overflows: all ranks leave the step out together, nothing has changed, and the next one is fine."""

from __future__ import annotations

import os
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.nn import functional as F

import pipekern as pk
from pipekern.parallel.tensor import local
from tests.launch import launch, values
from tests.runtime import breaking
from tests.runtime.parity import same_bits
from tests.runtime.step import gradients, run

MICROBATCHES = breaking.MICROBATCHES
INITIAL = 256.0


class Place(NamedTuple):
    """Pipeline ranks, replicas, zero, what the optimizer is, and tensor-parallel parts."""

    pp: int
    dp: int = 1
    zero: int = 0
    optimizer: str = "torch"
    schedule: str = "1f1b"
    recompute: str = "none"
    tp: int = 1


def _batch(case: breaking.Case | None) -> tuple[Tensor, Tensor]:
    x, y = (case or breaking.Case("none", 0, 0)).batch()
    return x.float(), y.float()


def _pipe(place: Place, seed: int, **options: Any) -> pk.Pipeline:
    torch.manual_seed(seed)
    net = breaking.net(6)
    return pk.Pipeline(
        net, loss_fn=breaking.loss_fn, microbatches=MICROBATCHES, ranks=place.pp, precision="fp16", timeout=20.0,
        zero=place.zero, schedule=place.schedule, recompute=place.recompute,
        mesh={"dp": place.dp, "pp": place.pp, "tp": place.tp} if place.dp * place.tp > 1 else None,
        tensor_parallel={"*.inner": ColwiseParallel(output_layouts=Replicate())} if place.tp > 1 else None,
        loss_scale=options.pop("loss_scale", None) or pk.optim.LossScale(initial=INITIAL), **options,
    )  # fmt: skip


def _optimizer(pipe: pk.Pipeline, place: Place) -> torch.optim.Optimizer:
    return pipe.optimizer(torch.optim.AdamW if place.optimizer == "torch" else pk.optim.AdamW, lr=1e-2)


def _everything(pipe: pk.Pipeline, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of parameters and of what the optimizer keeps for each."""
    named = dict(pipe.named_parameters())
    kept = {n: {k: local(torch.as_tensor(v)).clone() for k, v in optimizer.state[p].items()} for n, p in named.items()}
    return {"parameters": {name: local(p.detach()).clone() for name, p in named.items()}, "optimizer": kept}


def _overflow_everywhere(_: int, place: Place, seed: int) -> None:
    """After a good step one that overflows at each layer and micro-batch in turn, in one of the replicas."""
    replica = int(os.environ.get("RANK", "0")) // (place.pp * place.tp)
    with _pipe(place, seed) as pipe:
        assert pipe.loss_scale is not None
        optimizer = _optimizer(pipe, place)
        pipe.train_step(*_batch(None))
        optimizer.step()
        everywhere = product(("forward", "backward"), range(6), range(MICROBATCHES))
        for turn, (kind, layer, microbatch) in enumerate(everywhere):
            optimizer.zero_grad()
            before = _everything(pipe, optimizer)
            bad = breaking.Case(kind, layer, microbatch) if turn % place.dp == replica else None
            loss = pipe.train_step(*_batch(bad))
            where = f"{kind} of layer {layer}, micro-batch {microbatch}"
            assert all(p.grad is None for p in pipe.parameters()), where
            assert bool(loss.isfinite()) is (kind == "backward"), where
            assert pipe.loss_scale.value == INITIAL / 2, where
            optimizer.step()
            assert same_bits(_everything(pipe, optimizer), before), where
            pipe.loss_scale.load({"value": INITIAL, "good": 0, "overflows": 0})
        torch.manual_seed(seed + replica)
        batch = _batch(None)
        pipe.train_step(*batch)
        assert pipe.loss_scale.value == INITIAL
        optimizer.step()
        assert not same_bits(_everything(pipe, optimizer), before)


@pytest.mark.parametrize("optimizer", ["torch", "pk"])
@pytest.mark.parametrize("pp", [1, 2, 3])
def test_in_one_process(pp: int, optimizer: str, seed: int) -> None:
    _overflow_everywhere(pp, Place(pp, optimizer=optimizer), seed)


@pytest.mark.parametrize(
    "place", [Place(2, schedule="zb-h1"), Place(2, schedule="zb-v"), Place(2, recompute="full")], ids=str
)
def test_other_ways_to_run(place: Place, seed: int) -> None:
    _overflow_everywhere(place.pp, place, seed)


@pytest.mark.parametrize(
    "place",
    [
        Place(2),
        Place(3, optimizer="pk"),
        Place(1, 2, 2),
        Place(2, 2, 0, "pk"),
        Place(2, 2, 3),
        Place(2, tp=2, optimizer="pk"),
        Place(1, 2, 2, tp=2),
    ],
    ids=str,
)
def test_among_processes(place: Place, seed: int) -> None:
    values(launch(_overflow_everywhere, place.pp * place.dp * place.tp, 0, place, seed, timeout=60.0))


def _gradients_after(skipped: int, pp: int, seed: int) -> tuple[dict[str, Any], int]:
    """Of the first step that is not left out, and how many were."""
    scale = pk.optim.LossScale(initial=INITIAL * 2.0**skipped)
    with _pipe(Place(pp), seed, loss_scale=scale) as pipe:
        torch.manual_seed(seed)
        x, y = _batch(None)
        for count in range(60):
            loss = pipe.train_step(x, y)
            assert loss.isfinite()
            if any(p.grad is not None for p in pipe.parameters()):
                return gradients(pipe), count
    raise AssertionError("every step was left out")


@pytest.mark.parametrize("pp", [1, 2, 3])
def test_a_scale_that_is_too_large_falls_until_it_is_not(pp: int, seed: int) -> None:
    """By halves; the gradients are then those of a smaller scale, but for what float16 loses below its least number."""
    want, none = _gradients_after(0, pp, seed)
    got, skipped = _gradients_after(30, pp, seed)
    assert none == 0 and 5 < skipped < 30
    largest = max(float(grad.abs().max()) for grad in want.values())
    assert max(float((got[n] - want[n]).abs().max()) for n in want) <= 1e-2 * largest


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("layer", range(6))
def test_at_the_least_scale_the_policy_applies(kind: str, layer: int, seed: int) -> None:
    """A smaller scale cannot help: the place is named."""
    case = breaking.Case(kind, layer, 2)
    home = [0, 0, 0, 1, 1, 1]
    options: dict[str, Any] = {"split": [3, 3]}
    least = pk.optim.LossScale(initial=2.0, minimum=2.0)
    with _pipe(Place(2), seed, loss_scale=least, **options) as pipe:
        with pytest.raises(pk.NumericsError) as raised:
            pipe.train_step(*_batch(case))
        assert f"(rank {home[layer]}) is not finite" in str(raised.value), raised.value
        assert "micro-batch 2" in str(raised.value) and "first at" in str(raised.value)
        assert pipe.loss_scale is not None and pipe.loss_scale.value == 2.0
    least = pk.optim.LossScale(initial=2.0, minimum=2.0)
    with _pipe(Place(2), seed, loss_scale=least, on_nonfinite="skip", **options) as pipe:
        pipe.train_step(*_batch(case))
        assert all(p.grad is None for p in pipe.parameters())
    least = pk.optim.LossScale(initial=2.0, minimum=2.0)
    with _pipe(Place(2), seed, loss_scale=least, on_nonfinite="ignore", **options) as pipe:
        loss = pipe.train_step(*_batch(case))
        made = [loss, *(p.grad for p in pipe.parameters() if p.grad is not None)]
        assert len(made) == 13 and not all(bool(value.isfinite().all()) for value in made)


def _one_stage_overflows(ranks: int, tied: bool, seed: int) -> list[bool]:
    """Whose gradients are gone after a step of which one product alone overflows."""
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 4) for _ in range(4)]
    if tied:
        layers[3].weight = layers[0].weight
    net = nn.Sequential(*layers)
    with pk.Pipeline(net, loss_fn=F.mse_loss, microbatches=2, ranks=ranks, precision="fp16", timeout=20.0) as pipe:
        x = torch.randn(4, 4)
        x[3] = 65504.0
        pipe.train_step(x, x)
        return [p.grad is None for p in pipe.parameters()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("processes", [False, True])
def test_a_tied_weight(processes: bool, tied: bool, seed: int) -> None:
    assert all(all(gone) for gone in run(processes, _one_stage_overflows, 2, tied, seed))
