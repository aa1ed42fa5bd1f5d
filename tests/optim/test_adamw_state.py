"""The optimizer's state: saved, loaded, from torch's and to it, copied."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from pipekern import ConfigError
from tests.optim.parameters import draw, equal, give, groups, parameters


@pytest.mark.parametrize("from_torch", [False, True])
def test_a_state_goes_both_ways(from_torch: bool, device: str) -> None:
    """Six steps of one, the state into the other, six more: as twelve steps of torch's. Parameters at odds in steps."""
    classes: list[Any] = [torch.optim.AdamW, pk.optim.AdamW]
    first, second = classes if from_torch else classes[::-1]
    ours = parameters(device)
    theirs = copy.deepcopy(ours)
    optimizer, want = first(groups(ours), lr=1e-2), torch.optim.AdamW(groups(theirs), lr=1e-2)
    for step in range(12):
        if step == 6:
            state = optimizer.state_dict()
            assert {tuple(sorted(own)) for own in state["state"].values()} == {("exp_avg", "exp_avg_sq", "step")}
            optimizer = second(groups(ours), lr=7.0)
            optimizer.load_state_dict(copy.deepcopy(state))
        grads: list[Tensor | None] = [grad if place != step % 4 else None for place, grad in enumerate(draw(ours))]
        for own in (ours, theirs):
            give(own, grads)
        optimizer.step()
        want.step()
    equal(ours, theirs)
    steps = [float(own["step"]) for _, own in sorted(optimizer.state_dict()["state"].items())]
    assert steps == [9, 9, 9, 9, 12]


def test_a_saved_state_is_a_copy_of_float32_moments(device: str) -> None:
    """Also of bfloat16 parameters, whose moments torch would round; hooks see and change what is loaded."""
    own = parameters(device, torch.bfloat16)
    optimizer = pk.optim.AdamW(own)
    give(own, draw(own))
    optimizer.step()
    state = optimizer.state_dict()
    assert state["state"][1]["step"].dtype == torch.float32
    other = pk.optim.AdamW(own)
    other.register_load_state_dict_pre_hook(lambda _, given: {**given, "state": {1: given["state"][1]}})
    other.load_state_dict(state)
    assert list(other.state) == [own[1]]
    for name in ("exp_avg", "exp_avg_sq"):
        loaded, saved = other.state[own[1]][name], state["state"][1][name]
        assert torch.equal(loaded, saved)
        assert (loaded.dtype, loaded.data_ptr() == saved.data_ptr()) == (torch.float32, False)


def test_a_deep_copy_goes_on(device: str) -> None:
    ours = parameters(device)
    optimizer = pk.optim.AdamW(ours, max_norm=1.0)
    give(ours, draw(ours))
    optimizer.step()
    theirs, other = copy.deepcopy((ours, optimizer))
    grads = draw(ours)
    for own in (ours, theirs):
        give(own, grads)
    optimizer.step()
    other.step()
    assert all(map(torch.equal, ours, theirs))
    assert [int(other.state[p]["step"]) for p in theirs] == [2] * len(theirs)


def test_states_that_are_refused_change_nothing() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = pk.optim.AdamW([p], lr=0.5)
    p.grad = torch.ones(2)
    optimizer.step()
    before = optimizer.state_dict()
    sgd = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": before["param_groups"]}
    narrow = {"state": {0: {**before["state"][0], "exp_avg": torch.ones(1)}}, "param_groups": before["param_groups"]}
    for given, rule in (
        (torch.optim.AdamW([p], amsgrad=True).state_dict(), "amsgrad is on"),
        (torch.optim.AdamW([p], maximize=True).state_dict(), "maximize is on"),
        (sgd, "has .'momentum_buffer'.; AdamW's has"),
        (narrow, r"exp_avg of parameter 0 has shape \(1,\)"),
    ):
        with pytest.raises(ConfigError, match=rule):
            optimizer.load_state_dict(given)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert all(torch.equal(after["state"][0][name], value) for name, value in before["state"][0].items())
