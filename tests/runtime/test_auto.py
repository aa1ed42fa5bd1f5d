"""``schedule="auto"``: the schedule and the split with the shortest simulated step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pipekern as pk
from tests.launch import launch, values


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)]).double()


def _pipeline(**options: Any) -> pk.Pipeline:
    return pk.Pipeline(_net(), loss_fn=nn.MSELoss(), microbatches=4, schedule="auto", **options)


def test_equal_layers_get_a_schedule_with_chunks_and_stay_exact() -> None:
    x = torch.randn(8, 8, dtype=torch.float64)
    pipe = _pipeline(ranks=2)
    assert pipe._parts.blueprint.schedule.chunks > 1
    assert pk.verify(pipe, x, x).max_error < 1e-12


def test_chunks_are_kept_to() -> None:
    blueprint = _pipeline(ranks=2, chunks=1)._parts.blueprint
    assert [len(units) for units in blueprint.stages] == [4, 4]


def test_costs_that_are_given_decide_the_split() -> None:
    costs = pk.LayerCosts.given([7, 1, 1, 1, 1, 1, 1, 1])
    blueprint = _pipeline(ranks=2, chunks=1, split=costs)._parts.blueprint
    assert [len(units) for units in blueprint.stages] == [1, 7]


def test_a_split_of_ones_own_is_refused() -> None:
    with pytest.raises(pk.ConfigError, match="chooses the split itself"):
        _pipeline(ranks=2, split=[4, 4])


def _measured() -> list[int]:
    x = torch.randn(8, 8, dtype=torch.float64)
    with _pipeline(split=pk.profile(_net(), x)) as pipe:
        assert pk.verify(pipe, torch.ones_like(x), x * 0).max_error < 1e-12
        return [len(units) for units in pipe._parts.blueprint.stages]


def test_ranks_that_measure_different_costs_split_alike() -> None:
    one, other = values(launch(_measured, 2))
    assert one == other
