"""Shared parameters are found, shared state is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipekern.errors import ConfigError
from pipekern.stage.sharing import Tie, find_ties, refuse_shared_state
from pipekern.stage.unit import Unit, cut
from tests.runtime.models import Gpt


def _stages(model: nn.Module, *counts: int) -> list[list[Unit]]:
    units = cut(model, 0)[1]
    assert sum(counts) == len(units)
    return [units[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]


def test_golden() -> None:
    """Embedding on rank 0 and head on rank 1 are one weight, under two names."""
    assert find_ties(_stages(Gpt(tied=True), 4, 4), [0, 1]) == [Tie({0: "embed.weight", 1: "head.weight"})]
    assert find_ties(_stages(Gpt(tied=False), 4, 4), [0, 1]) == []


def test_ties_on_one_rank_are_none() -> None:
    """One tensor, one gradient: autograd sums it."""
    assert find_ties(_stages(Gpt(tied=True), 4, 4), [0, 0]) == []
    assert find_ties(_stages(Gpt(tied=True), 2, 2, 2, 2), [0, 1, 1, 0]) == []


def test_ties_of_many_ranks_in_the_models_order() -> None:
    layers = [nn.Linear(2, 2) for _ in range(6)]
    layers[5].bias = layers[2].bias = layers[1].bias
    layers[4].weight = layers[0].weight
    found = find_ties(_stages(nn.Sequential(*layers), 1, 1, 1, 1, 1, 1), [0, 1, 2, 0, 1, 2])
    assert found == [Tie({0: "0.weight", 1: "4.weight"}), Tie({1: "1.bias", 2: "2.bias"})]


def test_shared_module_with_buffers_is_refused_wherever_it_is() -> None:
    """Every fault at once, by name."""
    one, two = nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2), nn.ReLU())
    two.register_forward_hook(lambda *_: None)  # so that it stays one unit
    model = nn.Sequential(one, two, nn.Linear(2, 2), one, two)
    with pytest.raises(ConfigError) as refusal:
        refuse_shared_state(_stages(model, 2, 3))
    text = str(refusal.value)
    assert "3 (BatchNorm1d) is in stages 0 and 1 (there as 0)" in text
    assert "4.0 (BatchNorm1d) is in stages 0 and 1 (there as 1.0)" in text
    assert "Move the split" in text
    refuse_shared_state(_stages(model, 5))


def test_what_a_split_does_not_break_is_taken() -> None:
    """Shared modules without buffers, and a buffer that is only read: a causal mask in several stages."""
    shared = nn.Linear(2, 2)
    refuse_shared_state(_stages(nn.Sequential(shared, nn.ReLU(), shared), 1, 1, 1))
    refuse_shared_state(_stages(Gpt(tied=True), *([1] * 8)))


def test_running_statistics_of_separate_modules_are_their_own() -> None:
    norms = [nn.BatchNorm1d(2) for _ in range(3)]
    norms[1].weight = norms[0].weight
    refuse_shared_state(_stages(nn.Sequential(*norms), 1, 1, 1))
    assert find_ties(_stages(nn.Sequential(*norms), 1, 1, 1), [0, 1, 2]) == [Tie({0: "0.weight", 1: "1.weight"})]
    assert torch.equal(norms[0].running_mean, norms[1].running_mean)  # type: ignore[arg-type]
