"""Costs of units by their weight matrices."""

from __future__ import annotations

import pytest
from torch import nn

from pipekern.stage.estimate import estimate
from pipekern.stage.unit import cut
from tests.runtime.models import Gpt


def _costs(model: nn.Module) -> list[float]:
    return estimate(cut(model, 0)[1])


def test_golden() -> None:
    """Two matrices of 12 and 24 elements: multiplications a position, and a little for every unit."""
    costs = _costs(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 6)))
    assert [round(cost - costs[1]) for cost in costs] == [12, 0, 24]
    assert 0 < costs[1] <= 1


def test_an_embedding_is_a_look_up() -> None:
    costs = _costs(nn.Sequential(nn.Embedding(10**6, 4), nn.Linear(4, 4)))
    assert costs[0] < costs[1]


def test_a_head_counts_and_blocks_are_equal() -> None:
    costs = _costs(Gpt(tied=True))
    assert costs[0] < costs[1]
    assert costs[1:7] == pytest.approx([costs[1]] * 6)
    assert costs[7] == pytest.approx(11 * 8, rel=0.1)


def test_every_unit_counts_something_where_nothing_has_weights() -> None:
    costs = _costs(nn.Sequential(*(nn.Tanh() for _ in range(7))))
    assert min(costs) > 0
    assert len(set(costs)) == 1
