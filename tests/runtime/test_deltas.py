"""A step's own gradients, apart from those before it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipekern.runtime.deltas import Deltas, tie_links
from pipekern.stage.sharing import Tie
from pipekern.transport.base import Link


def _parameter(grad: float | None) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = None if grad is None else torch.full((2,), grad)
    return parameter


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_golden() -> None:
    """5 from before, 6 of this step divided by 3: together 7, in the tensor that was there."""
    parameter = _parameter(5.0)
    before = _grad(parameter)
    deltas = Deltas([parameter])
    assert parameter.grad is None
    parameter.grad = torch.full((2,), 6.0)
    deltas.divide(3.0)
    deltas.merge()
    assert parameter.grad is before
    assert before.tolist() == [7.0, 7.0]


@pytest.mark.parametrize(("before", "step", "after"), [(None, None, None), (5.0, None, 5.0), (None, 6.0, 2.0)])
def test_parameters_without_a_gradient(before: float | None, step: float | None, after: float | None) -> None:
    parameter = _parameter(before)
    deltas = Deltas([parameter])
    parameter.grad = None if step is None else torch.full((2,), step)
    deltas.divide(3.0)
    deltas.merge()
    assert (None if parameter.grad is None else parameter.grad[0].item()) == after


def test_holders_of_the_same_weights_are_linked_both_ways() -> None:
    """With a slot for each weight that two ranks share, and one more."""
    ties = [Tie({0: "a", 2: "b"}), Tie({0: "c", 1: "d", 2: "e"})]
    assert tie_links(ties) == [
        Link("tie 0>1", 0, 1, 2), Link("tie 0>2", 0, 2, 3), Link("tie 1>0", 1, 0, 2),
        Link("tie 1>2", 1, 2, 2), Link("tie 2>0", 2, 0, 3), Link("tie 2>1", 2, 1, 2),
    ]  # fmt: skip
    assert tie_links([]) == []
