"""Which device each rank gets, and what is refused before anything starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import pipekern as pk
from pipekern.errors import ConfigError
from pipekern.runtime.devices import device_here, devices_here, existing, refuse_ties_apart
from pipekern.stage.sharing import Tie
from tests.launch import launch, values

CPU = torch.device("cpu")


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    yield


@pytest.mark.usefixtures("two_cards")
def test_golden() -> None:
    assert devices_here(["cuda:0", "cuda:1", "cpu"], 3) == [torch.device("cuda", 0), torch.device("cuda", 1), CPU]
    assert devices_here(["cuda"], 2) == [torch.device("cuda", 1)] * 2  # the current one
    assert devices_here(None, 3) == [torch.device("cuda", rank) for rank in (0, 1, 0)]
    assert device_here(["cpu:0", "cuda:7"], 0, 2) == CPU  # the other entry is for the other process


@pytest.mark.usefixtures("two_cards")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["cuda:7", "cpu"], ["'cuda:7'", "are 2", "'cuda:0', 'cuda:1' or 'cpu'"]),
        (["cpu", "cud:0"], ["'cud:0'", "no device", "'cuda:0'"]),
        (["cpu", 1.5], ["1.5", "no device"]),
        (["cpu", "cpu:3"], ["'cpu:3'", "one CPU", "'cpu'"]),
        (["cpu", "meta"], ["'meta'", "holds no tensors", "'cpu'"]),
        (["cpu"] * 3, ["3 entries for 2 ranks"]),
        ([], ["0 entries for 2 ranks"]),
        ("cpu", ["devices='cpu'", "a list", "['cpu']"]),
    ],
)
def test_refused(given: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        devices_here(given, 2)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert devices_here(None, 2) == [CPU, CPU]
    for device in ("cuda", "cuda:0"):
        with pytest.raises(
            ConfigError, match=f"'{device}', and torch .* (finds no CUDA device|is built without CUDA); give 'cpu'"
        ):
            existing(device)


def refused_on(rank: int) -> str:
    """What a rank of two is told where only one of them has asked for what is not there."""
    torch.cuda.device_count = lambda: 0
    own = "cuda:1" if int(os.environ["RANK"]) == rank else "cpu"
    with pytest.raises(ConfigError) as refusal:
        pk.Pipeline(
            nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), loss_fn=nn.MSELoss(), microbatches=2, devices=[own]
        )
    return str(refusal.value)


def test_a_device_that_one_rank_lacks_is_refused_on_all() -> None:
    own, others = values(launch(refused_on, 2, 0))
    assert own.startswith("devices: 'cuda:1'") and "rank 0: devices: 'cuda:1'" in others


def test_a_weight_on_two_devices_of_one_process() -> None:
    card = torch.device("cuda", 0)
    ties = [Tie({0: "embed.weight", 1: "head.weight"})]
    refuse_ties_apart(ties, [card, card])
    with pytest.raises(ConfigError, match=r"embed\.weight on cuda:0, head\.weight on cpu.*torchrun"):
        refuse_ties_apart(ties, [card, CPU])
