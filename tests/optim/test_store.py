"""The parameters of several stages: what lies together, what is low, and what goes between replicas when."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import nn

import pipekern as pk
from pipekern.errors import ConfigError
from pipekern.optim import store as storing
from pipekern.optim.store import Store, lay_out, low_precision
from pipekern.runtime import start as starting
from tests.launch import launch, values
from tests.optim.together import Together

Named = list[tuple[str, nn.Parameter]]


def _stages() -> dict[int, Named]:
    """Two stages of one process with a weight in common; a frozen parameter, and one without numbers."""
    torch.manual_seed(0)
    shared, frozen = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3), requires_grad=False)
    first = [("embed", shared), ("0.weight", nn.Parameter(torch.randn(5))), ("0.frozen", frozen)]
    second = [("1.weight", nn.Parameter(torch.randn(3, 3))), ("1.none", nn.Parameter(torch.ones(0))), ("head", shared)]
    return {0: first, 1: second}


def _home(stages: dict[int, Named], stage: int) -> dict[int, int]:
    return {id(stages[0][0][1]): stage}


def _store(zero: int = 0, replicas: Any = None, low: bool = False, home: int = 0) -> tuple[Store, dict[int, Named]]:
    stages = _stages()
    names = [name for named in stages.values() for name, _ in named]
    dtypes = dict.fromkeys(names, torch.bfloat16) if low else {}
    layouts = lay_out(stages, _home(stages, home), dtypes, 1 << 20)
    return Store(stages, layouts, dtypes, replicas, zero), stages


def test_golden_layout() -> None:
    """A weight of two stages lies alone at its home; dtypes lie apart; frozen and empty ones are nowhere."""
    stages = _stages()
    assert lay_out(stages, _home(stages, 0), {}, 1 << 20) == {0: [["embed"], ["0.weight"]], 1: [["1.weight"]]}
    assert lay_out(stages, _home(stages, 1), {}, 1 << 20) == {0: [["0.weight"]], 1: [["1.weight"], ["head"]]}
    named: Named = [(n, nn.Parameter(torch.ones(4, dtype=d))) for n, d in (("a", torch.float32), ("b", torch.float64),
                    ("c", torch.float32), ("d", torch.float32))]  # fmt: skip
    assert lay_out({0: named}, {}, {"d": torch.bfloat16}, 1 << 20) == {0: [["a", "c"], ["b"], ["d"]]}
    assert lay_out({0: named}, {}, {}, 16) == {0: [["a"], ["c"], ["d"], ["b"]]}
    twice = [("a", named[0][1]), ("again", named[0][1])]
    assert lay_out({0: twice}, {}, {}, 1 << 20) == {0: [["a"]]}


def test_low_precision() -> None:
    """All but layers with running statistics, whose parameters it keeps also where another module has them."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LayerNorm(2), nn.Embedding(3, 2))
    named = list(net.named_parameters())
    found = low_precision(named, net.modules(), torch.float16)
    assert set(found) == {"0.weight", "0.bias", "2.weight", "2.bias", "3.weight"}
    assert set(found.values()) == {torch.float16}
    net[2].double()
    with pytest.raises(ConfigError, match=r"2\.weight, 2\.bias are float64; call \.float\(\) on the model"):
        low_precision(named, net.modules(), torch.float16)


@pytest.mark.parametrize("low", [False, True])
def test_parameters_of_an_optimizer(low: bool) -> None:
    """One object a weight, under each of its names; a frozen one as the stage computes with it."""
    store, stages = _store(low=low)
    assert list(store.parameters) == ["embed", "0.weight", "0.frozen", "1.weight", "1.none", "head"]
    assert store.parameters["embed"] is store.parameters["head"]
    plain = {name: p for named in _stages().values() for name, p in named}
    for name, p in store.parameters.items():
        stays = name in ("0.frozen", "1.none")  # nobody changes them
        assert p.dtype is (torch.bfloat16 if low and stays else torch.float32)
        assert torch.equal(p, plain[name].to(p.dtype)) and p.requires_grad is plain[name].requires_grad
    for named in stages.values():
        for name, p in named:
            assert p.dtype is (torch.bfloat16 if low else torch.float32)
            assert torch.equal(p, plain[name].to(p.dtype))
    assert (store.has("head"), store.has("0.frozen"), store.has("elsewhere")) == (True, False, False)


def _together(stores: Sequence[Store]) -> list[list[str]]:
    return [cast(Together, store.replicas).calls for store in stores]


def _begin(stores: Sequence[Store]) -> None:
    for store in stores:
        store.begin()


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("home", [0, 1])
def test_a_step(zero: int, home: int) -> None:
    """As a program runs it: gathers, a join before each stage, sums after each; what two stages give is added."""
    both = [_store(zero, r, home=home) for r in Together.all(2)]
    stores = [store for store, _ in both]
    weight = {name: p.detach().clone() for named in _stages().values() for name, p in named}
    _begin(stores)
    for store in stores if zero else ():
        for stage, buckets in store.buckets.items():
            for index in range(len(buckets)):
                store.gather(stage, index)
    for factor, (store, stages) in enumerate(both, start=1):
        for stage in (0, 1):
            if zero:
                store.join(stage)
            for name, p in stages[stage]:
                assert torch.equal(p, weight[name])
                if p.requires_grad and p.numel():
                    assert p.grad is not None
                    p.grad += factor
    for store in stores:
        for stage, buckets in reversed(store.buckets.items()):
            for index in range(len(buckets)):
                store.reduce(stage, index)
    for store in stores:
        store.finish()
        spans = [(op, stage, index) for op, stage, index, _ in store.spans]
        keys = [(stage, index) for stage, buckets in store.buckets.items() for index in range(len(buckets))]
        assert sorted(spans) == sorted(
            (op, *key) for op in (("GATHER", "REDUCE") if zero else ("REDUCE",)) for key in keys
        )
    for calls in _together(stores):
        assert sorted(calls) == (["gather"] * 3 + ["scatter"] * 3 if zero else ["sum"] * 3)
    got: dict[str, float] = {}
    for store in stores:
        for name, p in store.parameters.items():
            if p.grad is not None:
                assert bool((p.grad == p.grad.flatten()[0]).all())
                got[name] = float(p.grad.flatten()[0])
    assert got == {"embed": 6.0, "0.weight": 3.0, "1.weight": 3.0, "head": 6.0}


@pytest.mark.parametrize("home", [0, 1])
def test_a_stage_joins_what_it_computes_with(home: int) -> None:
    """Also a weight that lies at another stage, at which its own gather is begun."""
    (one, stages), (other, _) = (_store(3, r, home=home) for r in Together.all(2))
    for store in (one, other):
        for stage, buckets in store.buckets.items():
            for index in range(len(buckets)):
                store.gather(stage, index)
    one.join(0)
    assert torch.equal(stages[0][0][1], _stages()[0][0][1]) and torch.equal(stages[0][1][1], _stages()[0][1][1])
    assert list(one._gathers) == [(1, 0)]
    one.join(1)
    assert not one._gathers


def test_ready_makes_values_of_what_an_optimizer_has_changed() -> None:
    """In one process, also after a change that no step made."""
    store, stages = _store(low=True)
    with torch.no_grad():
        store.parameters["1.weight"].fill_(0.3)
    with store.ready():
        assert bool((stages[1][0][1] == torch.tensor(0.3).bfloat16()).all())
    store.put("head", torch.full((4, 3), 2.0))
    assert bool((store.parameters["embed"] == 2).all())
    whole = store.whole(lambda piece: piece.parameter.detach())
    assert sorted(whole) == ["0.weight", "1.weight", "embed", "head"] and torch.equal(whole["embed"], whole["head"])


@pytest.mark.parametrize("low", [False, True])
def test_a_parameter_that_takes_gradients_only_later(low: bool) -> None:
    """It would drift between replicas, and train without a master, in silence."""
    store, stages = _store(low=low)
    store.begin()
    stages[0][2][1].requires_grad_(True)
    with pytest.raises(ConfigError, match=r"0\.frozen took no gradient when the pipeline was made"):
        store.begin()


def _in_turn(zero: int, limit: int) -> tuple[dict[str, torch.Tensor], bool]:
    """The gradients of a pipeline's step, and whether no sum began before the one before it had ended."""
    vars(storing)["_ARRIVING"] = limit
    vars(starting)["_bucket"] = lambda *_: 1  # a parameter each
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(600, 600) for _ in range(4)))
    with pk.Pipeline(layers, loss_fn=nn.MSELoss(), microbatches=2, mesh={"dp": 2}, zero=zero, timeout=20.0) as pipe:
        x = torch.ones(4, 600) * (1 + int(os.environ["RANK"]))
        pipe.train_step(x, x)
        store = pipe._parts.store
        assert store is not None
        sums = [pending for op, _, _, pending in store.spans if op == "REDUCE"]
        assert len(sums) == 8
        apart = all(a.ended and a.ended <= b.started for a, b in pairwise(sums))
        return store.whole(lambda piece: piece.parameter.grad), apart


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_sums_that_have_no_room_wait_for_each_other(zero: int) -> None:
    """And are the same bits."""
    at_once, in_turn = (values(launch(_in_turn, 2, zero, limit)) for limit in (1 << 40, 0))
    for (wanted, _), (got, apart) in zip(at_once, in_turn, strict=True):
        assert apart
        assert wanted.keys() == got.keys()
        assert all(torch.equal(value, got[name]) for name, value in wanted.items())
