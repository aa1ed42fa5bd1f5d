"""Proof of gradients: a pipeline trains as the unsplit module does, within 1e-12 in float64."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import pipekern as pk
from tests.launch import launch, values
from tests.runtime.models import KINDS, build
from tests.runtime.parity import ALL, Case, Trained, allowed, compare, same_bits, train
from tests.runtime.payloads import PAYLOADS
from tests.runtime.step import gradients
from tests.transport import fake_cuda

RANKS, MICROBATCHES = (1, 2, 3, 4), (1, 2, 3, 5, 8)
SCHEDULES = tuple(name for name in pk.schedule.names() if pk.schedule.describe(name).runnable)
GRID = list(product(SCHEDULES, RANKS, MICROBATCHES))


def _sample(ranks: int, transport: str = "auto") -> list[Case]:
    """Over two numbers of ranks, every schedule with every number of micro-batches; the kinds of model in turn."""
    pairs = [
        (s, m) for s, m in list(product(SCHEDULES, MICROBATCHES))[ranks % 2 :: 2] if allowed(Case("", s, ranks, m))
    ]
    kinds = list(ALL)
    turn = [kinds[(i + i // len(MICROBATCHES) + 3 * ranks) % len(kinds)] for i in range(len(pairs))]
    return [Case(k, s, ranks, m, transport, 5 if k in KINDS else 1) for k, (s, m) in zip(turn, pairs, strict=True)]


def _whole(kinds: Iterable[str], ranks: int, schedule: str, transport: str, steps: int) -> list[Case]:
    cases = [Case(kind, schedule, ranks, m, transport, steps) for kind, m in product(kinds, MICROBATCHES)]
    return [case for case in cases if allowed(case)]


def _train_all(cases: list[Case], seed: int, again: bool = True) -> list[Trained]:
    """Each case; ``again``: twice, which must give the same bits."""
    runs = []
    for case in cases:
        try:
            first = train(case, seed)
            assert not again or same_bits(first, train(case, seed)), "two runs differ"
        except Exception as error:
            raise AssertionError(f"{case} failed: {error}") from error
        runs.append(first)
    return runs


def _prove(
    cases: list[Case], seed: int, processes: int, again: bool = True, known: dict[Any, Trained] | None = None
) -> None:
    """Train ``cases`` on so many processes (0: in this one) and compare them."""
    if processes:
        runs = values(launch(_train_all, processes, cases, seed, again, timeout=240))
    else:
        runs = [_train_all(cases, seed, again)]
    for case, *of_case in zip(cases, *runs, strict=True):
        compare(case, of_case, seed, known)


def test_golden() -> None:
    """y = 3·(2·x) over two stages, loss mean(y²) on x = 1, 2: loss 90, d/dw₁ = 90, d/dw₂ = 60."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    net.load_state_dict({"0.weight": torch.tensor([[2.0]]), "1.weight": torch.tensor([[3.0]])})
    with pk.Pipeline(net, loss_fn=nn.MSELoss(), microbatches=2, ranks=2) as pipe:
        loss = pipe.train_step(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))
        assert loss == 90.0
        assert {name: grad.item() for name, grad in gradients(pipe).items()} == {"0.weight": 90.0, "1.weight": 60.0}


@pytest.mark.parametrize("ranks", RANKS)
def test_in_one_process(ranks: int, seed: int) -> None:
    _prove(_sample(ranks, "local"), seed, processes=0)


@pytest.mark.parametrize("ranks", RANKS)
def test_among_processes(ranks: int, seed: int) -> None:
    _prove(_sample(ranks), seed, processes=ranks)


def test_among_processes_over_torch_distributed(seed: int) -> None:
    _prove(_sample(2, "dist")[::3], seed, processes=2)


def _train_on_stand_in(cases: list[Case], seed: int, together: bool, name: str = "fake-cuda") -> list[Trained]:
    """Over the CUDA transport on the stand-in driver, without a launcher where ``together``."""
    leaks = fake_cuda.load(name)
    if together:
        del os.environ["RANK"]
    runs = _train_all(cases, seed, again=False)
    assert leaks() == ""
    return runs


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("ranks", [3, *(pytest.param(ranks, marks=pytest.mark.full) for ranks in (2, 4))])
def test_over_the_cuda_transport(together: bool, ranks: int, seed: int) -> None:
    """Also with stages in the middle, several of them a rank, values that are no single tensor, and tied weights."""
    pytest.importorskip("pipekern._C")
    fake_cuda.library()
    cases = _sample(ranks, "cuda")[:: 4 if ranks == 3 else 1]
    runs = values(launch(_train_on_stand_in, 1 if together else ranks, cases, seed, together, timeout=240))
    for case, *of_case in zip(cases, *runs, strict=True):
        compare(case, of_case, seed)


@pytest.mark.parametrize("name", ["fake-mixed-odd", pytest.param("fake-mixed-even", marks=pytest.mark.full)])
@pytest.mark.parametrize("ranks", [3, *(pytest.param(ranks, marks=pytest.mark.full) for ranks in (2, 4))])
def test_over_cuda_and_cpu_ranks(name: str, ranks: int, seed: int) -> None:
    """Every second rank is on the CPU: links of all kinds, with activations, gradients, losses, flags, tied weights."""
    pytest.importorskip("pipekern._C")
    fake_cuda.library()
    first = name == "fake-mixed-odd"
    cases = _sample(ranks, "cuda")[first :: 4 if ranks == 3 else 1]
    runs = values(launch(_train_on_stand_in, ranks, cases, seed, False, name, timeout=240))
    for case, *of_case in zip(cases, *runs, strict=True):
        compare(case, of_case, seed)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("schedule", "ranks"), list(product(SCHEDULES, RANKS)))
def test_whole_grid(schedule: str, ranks: int, seed: int) -> None:
    """Every kind of model and number of micro-batches, in one process, and among processes over each transport."""
    known: dict[Any, Trained] = {}
    for transport, processes in (("local", 0), ("auto", ranks), ("dist", ranks)):
        cases = _whole(KINDS, ranks, schedule, transport, steps=2)
        _prove(cases, seed, processes, transport == "auto", known)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("schedule", "ranks"), list(product(SCHEDULES, RANKS)))
def test_whole_grid_of_payloads(schedule: str, ranks: int, seed: int) -> None:
    """Every kind of value between stages, with every way of tying weights, in one process and among processes."""
    known: dict[Any, Trained] = {}
    for transport, processes in (("local", 0), ("auto", ranks)):
        _prove(_whole(PAYLOADS, ranks, schedule, transport, steps=1), seed, processes, again=False, known=known)


@pytest.mark.parametrize(("schedule", "ranks", "microbatches"), [pair for pair in GRID if not allowed(Case("", *pair))])
def test_pair_that_a_schedule_does_not_take(schedule: str, ranks: int, microbatches: int) -> None:
    """Refused with the nearest number that it takes, and that one is taken."""
    options: dict[str, Any] = {"loss_fn": nn.MSELoss(), "ranks": ranks, "schedule": schedule}
    with pytest.raises(pk.ConfigError, match=rf"microbatches={microbatches}\b.*\bnearest microbatches=\d+") as refusal:
        pk.Pipeline(build("perceptron", 0), microbatches=microbatches, **options)
    nearest = int(re.findall(r"nearest microbatches=(\d+)", str(refusal.value))[0])
    nearer = [n for n in range(1, 20) if abs(n - microbatches) < abs(nearest - microbatches)]
    assert not any(allowed(Case("", schedule, ranks, n)) for n in nearer)
    pk.Pipeline(build("perceptron", 0), microbatches=nearest, **options).close()


def _weights_and_loss(kind: str, seed: int, ranks: int) -> Trained:
    return train(Case(kind, "gpipe", ranks, 2), seed)


def test_specs_give_the_same_bits_on_any_number_of_ranks(seed: int) -> None:
    """Weights at the start and the loss of the first step; on processes, and in one."""
    alone = train(Case("lazy", "gpipe", 1, 2, "local"), seed)
    for ranks in RANKS:
        runs = values(launch(_weights_and_loss, ranks, "lazy", seed, ranks))
        assert same_bits({name: value for run in runs for name, value in run.initial.items()}, alone.initial)
        assert all(same_bits(run.loss, alone.loss) for run in runs)
