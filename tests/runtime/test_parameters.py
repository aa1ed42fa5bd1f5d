"""Parameters and state as users see them: names, loading, saving, and torch's own clipping."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.launch import launch, values
from tests.runtime import reference
from tests.runtime.models import Gpt, normalised
from tests.runtime.step import PLACES, run, union


def _warned(ranks: int) -> list[str]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=1, ranks=ranks) as pipe:
        pipe.train_step(torch.randn(2, 4), torch.randn(2, 4))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            nn.utils.clip_grad_norm_(pipe.parameters(), 1.0)
            torch.optim.SGD(pipe.parameters(), lr=0.1)
            list(pipe.parameters())
        return [f"{type(w.message).__name__}: {w.message}" for w in caught]


def test_torchs_clipping_warns_where_it_sees_one_stage_only() -> None:
    """Once, with the mend; an optimizer over the same parameters does not warn, nor does a process with all stages."""
    assert _warned(2) == []
    for messages in values(launch(_warned, 2, 2)):
        (message,) = messages
        assert "pipe.clip_grad_norm_" in message
        assert "this rank's stages only" in message


def test_parameters_are_a_sequence() -> None:
    model = Gpt(tied=True)
    with pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=1, ranks=2) as pipe:
        parameters = pipe.parameters()
        assert isinstance(parameters, Sequence)
        assert len(parameters) == len(list(model.parameters())) == len({id(p) for p in parameters})
        assert parameters[0] is next(iter(parameters))
        assert {id(p) for p in parameters} == {id(p) for p in model.parameters()}


def _load(ranks: int, seed: int) -> tuple[dict[str, Tensor], list[str]]:
    """The state after loading another model's, and what loading parts of it raises."""
    with pk.Pipeline(normalised(), loss_fn=F.mse_loss, microbatches=1, ranks=ranks) as pipe:
        state = _state(seed)
        pipe.load_state_dict(state)
        loaded = {name: value.clone() for name, value in pipe.state_dict().items()}
        texts = []
        wrong: list[dict[str, Any]] = [{}, state | {name: torch.zeros(77) for name in loaded}]
        for bad in wrong:
            with pytest.raises(pk.ConfigError) as refusal:
                pipe.load_state_dict(bad)
            texts.append(str(refusal.value))
        assert all(torch.equal(value, loaded[name]) for name, value in pipe.state_dict().items()), "half loaded"
        return loaded, texts


def _state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = normalised().state_dict()
    return {name: torch.rand_like(v) if v.is_floating_point() else v + 7 for name, v in state.items()}


@PLACES
def test_load_state_dict(processes: bool, seed: int) -> None:
    """Each rank takes its part of the whole, buffers included; what is missing or misshapen is named."""
    results = run(processes, _load, 2, seed)
    assert reference.distance(union([state for state, _ in results]), _state(seed)) == 0.0
    for state, (missing, misshapen) in results:
        assert all(name in missing for name in state)
        assert all(name in misshapen for name in state)
        assert "missing []" in misshapen


def _resume(ranks: int, seed: int, state: dict[str, Tensor] | None) -> tuple[dict[str, Tensor], Tensor]:
    """A step of SGD from the weights given."""
    torch.manual_seed(seed)
    with pk.Pipeline(Gpt(tied=True), loss_fn=_loss, microbatches=2, ranks=ranks) as pipe:
        if state is not None:
            pipe.load_state_dict(state)
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
        x = torch.arange(20).reshape(4, 5) % 11
        loss = pipe.train_step(x, x)
        optimizer.step()
        return {name: value.clone() for name, value in pipe.state_dict().items()}, loss


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), targets)


def test_state_moves_between_numbers_of_ranks(seed: int) -> None:
    """Saved by one rank, loaded by three, and back, through the unsplit module."""
    first, _ = _resume(1, seed, None)
    Gpt(tied=True).load_state_dict(first)
    results = values(launch(_resume, 3, 3, seed + 1, first))
    alone, loss = _resume(1, seed + 2, first)
    assert all(torch.equal(other, loss) for _, other in results)
    assert reference.distance(union([state for state, _ in results]), alone) < 1e-6


def test_optimizer_is_the_users_class_with_its_options() -> None:
    with pk.Pipeline(normalised(), loss_fn=F.mse_loss, microbatches=1, ranks=2) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.25, momentum=0.5)
        assert isinstance(optimizer, torch.optim.SGD)
        assert [(group["lr"], group["momentum"]) for group in optimizer.param_groups] == [(0.25, 0.5)]
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in pipe.parameters()
        }
        with pytest.raises(TypeError):
            pipe.optimizer(torch.optim.SGD, speed=1)
