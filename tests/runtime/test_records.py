"""Dataclasses and named tuples between stages, in batches and outputs; one tensor in several places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.runtime import reference
from tests.runtime.step import PLACES, SCHEDULES, check, chunks, gradients, make_seeded, run, union


def _batch(samples: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 4, dtype=torch.float64), torch.randn(samples, 4, dtype=torch.float64)


class Mask(NamedTuple):
    keep: Tensor
    name: str = "mask"


@dataclass(frozen=True)
class Inner:
    """One tensor twice, and an integer one."""

    hidden: Tensor
    again: Tensor
    index: Tensor


@dataclass
class State:
    """What goes from stage to stage; its fields are set more than once by ``__post_init__`` if that ran again."""

    hidden: Tensor
    mask: Mask
    rest: dict[str, Any]
    runs: int = 0

    def __post_init__(self) -> None:
        self.runs += 1


class Make(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> State:
        h = self.layer(x)
        bent = torch.tanh(h)
        return State(h, Mask(x > 0), {"inner": [Inner(bent, bent, torch.arange(4))], "h": h, "x": x})


class Change(nn.Module):
    """Checks what is one tensor, uses it in all its places, and hands new ones on, some of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, state: State) -> State:
        (inner,) = state.rest["inner"]
        assert type(state) is State and state.runs == 1
        assert type(state.mask) is Mask and state.mask.name == "mask" and state.mask.keep.dtype is torch.bool
        assert inner.hidden is inner.again and state.rest["h"] is state.hidden
        assert not inner.index.requires_grad
        h = self.layer(torch.tanh(state.hidden * state.mask.keep + state.rest["h"]))
        bent = torch.tanh(inner.hidden * inner.again + h)
        return State(h, state.mask, {"inner": [Inner(bent, bent, inner.index)], "h": h, "x": state.rest["x"]})


class Read(nn.Module):
    def forward(self, state: State) -> Tensor:
        inner: Inner = state.rest["inner"][0]
        return state.hidden + inner.hidden * inner.again.sin() * inner.index + state.rest["h"] * state.rest["x"]


def _records() -> nn.Sequential:
    return nn.Sequential(Make(), Change(), Change(), Change(), Read())


@PLACES
@SCHEDULES
def test_dataclasses_and_named_tuples_between_stages(processes: bool, schedule: str, seed: int) -> None:
    """Also between stages of one rank. A tensor in several places gets one gradient, the sum over all of them."""
    split = {2: [1, 4], 4: [1, 1, 2, 1]}[2 * chunks(schedule)]
    check(_records, F.mse_loss, *_batch(10), processes=processes, seed=seed, schedule=schedule, split=split)


@PLACES
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_records_with_recomputation(processes: bool, recompute: str, seed: int) -> None:
    check(_records, F.mse_loss, *_batch(10), processes=processes, seed=seed, schedule="zb-h2", recompute=recompute)


class Repeat(nn.Module):
    """Its input itself, three times."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        return x, [x, x.view_as(x)], x


class Unite(nn.Module):
    def forward(self, parts: tuple[Tensor, list[Tensor], Tensor]) -> Tensor:
        first, (second, view), third = parts
        assert first is second and second is third and view is not first
        return first * second.sin() + view * third


def _repeats() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 4), Repeat(), nn.Identity(), Unite(), Repeat(), nn.Identity(), nn.Identity(), Unite()
    )


@PLACES
@SCHEDULES
def test_a_tensor_in_several_places_and_a_view_of_it(processes: bool, schedule: str, seed: int) -> None:
    """Over identity stages, where the input of a stage is its output."""
    ranks = 8 // chunks(schedule)
    options: dict[str, Any] = {"schedule": schedule, "split": [1] * 8, "ranks": ranks, "microbatches": 8}
    check(_repeats, F.mse_loss, *_batch(16), processes=processes, seed=seed, **options)


@dataclass
class Features:
    """A batch: tensors with samples, one of them twice, and what every micro-batch gets whole."""

    x: Tensor
    mask: Mask
    scale: float
    same: Tensor | None = None


class Enter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, features: Features) -> Features:
        assert type(features) is Features and features.same is features.x
        x = self.layer(features.x) * features.mask.keep[:, None]
        return Features(x, features.mask, features.scale, features.same)


class Leave(nn.Module):
    """The model's output is a dataclass too."""

    def forward(self, features: Features) -> Inner:
        assert features.same is not None
        return Inner(features.x * features.scale, features.same * 2, features.mask.keep)


def _features_model() -> nn.Sequential:
    return nn.Sequential(Enter(), nn.Identity(), Leave())


def _record_loss(output: Inner, target: Inner) -> Tensor:
    assert output.index.shape == target.index.shape
    return F.mse_loss(output.hidden, target.hidden) + F.mse_loss(output.again, target.again)


def _record_step(ranks: int, seed: int, x: Features, y: Inner) -> tuple[float, dict[str, Any], Inner | None]:
    model = make_seeded(_features_model, seed)
    with pk.Pipeline(model, loss_fn=_record_loss, microbatches=4, ranks=ranks) as pipe:
        loss = pipe.train_step(x, y)
        outputs = pipe.eval_step(x)
        assert float(pipe.eval_step(x, y)) == pytest.approx(float(loss), rel=1e-12)
        assert pk.verify(pipe, x, y).max_error <= 1e-12
        return float(loss), gradients(pipe), outputs


@PLACES
def test_batches_targets_and_outputs_may_be_records(processes: bool, seed: int) -> None:
    """Ten samples in four micro-batches: they are split and joined field by field."""
    x, y = _batch(10)
    features = Features(x, Mask(torch.rand(10) > 0.3), 0.5, x)
    target = Inner(y, y, torch.zeros(10))
    model = make_seeded(_features_model, seed)
    loss = _record_loss(model(features), target)
    loss.backward()
    want = reference.evaluate(model, features)
    results = run(processes, _record_step, 2, seed, features, target)
    assert all(abs(result[0] - loss.item()) <= 1e-12 for result in results)
    assert reference.distance(union([result[1] for result in results]), reference.gradients(model)) <= 1e-12
    (outputs,) = [result[2] for result in results if result[2] is not None]
    assert type(outputs) is Inner
    assert reference.distance(vars(outputs), vars(want)) <= 1e-12


class Hiding:
    """Holds a tensor where no walk can see it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class Hide(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, Hiding(x * 2)


class Find(nn.Module):
    def forward(self, pair: Any) -> Tensor:
        return pair[0] + pair[1].tensor


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-1f1b", "zb-v"])
def test_an_object_that_hides_a_tensor_is_refused_also_between_stages_of_one_rank(schedule: str) -> None:
    """Its gradient would be lost, or found by chance."""
    model = nn.Sequential(nn.Linear(4, 4), Hide(), Find(), nn.Linear(4, 4))
    ranks = 2 // chunks(schedule)
    pipe = pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=2, ranks=ranks, schedule=schedule, split=[2, 2])
    with pipe, pytest.raises(pk.ConfigError, match=r"test_records\.Hiding; between stages go"):
        pipe.train_step(*(t.float() for t in _batch()))


def test_outputs_that_cannot_be_joined_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), Hide())
    pipe = pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=2, ranks=2)
    with pipe, pytest.raises(pk.ConfigError, match=r"test_records\.Hiding a micro-batch, which cannot be joined"):
        pipe.eval_step(_batch()[0].float())


def _local_step(ranks: int) -> str:
    @dataclass
    class Local:
        x: Tensor

    class Into(nn.Module):
        def forward(self, x: Tensor) -> Local:
            return Local(x)

    class Out(nn.Module):
        def forward(self, local: Local) -> Tensor:
            return local.x

    model = nn.Sequential(nn.Linear(4, 4), Into(), Out(), nn.Linear(4, 4)).double()
    pipe = pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=2, ranks=ranks, split=[2, 2], timeout=20.0)
    with pipe, pytest.raises((pk.ConfigError, pk.TransportError)) as caught:
        pipe.train_step(*_batch())
    return str(caught.value)


@PLACES
def test_a_class_that_no_other_rank_could_find_is_refused(processes: bool) -> None:
    for text in run(processes, _local_step, 2):
        assert "_local_step.<locals>.Local" in text and "top level of a module" in text
