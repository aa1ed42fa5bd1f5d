"""Pipelines over devices of two kinds: against the unsplit module, and on the stand-in driver bit for bit.

tests/runtime/test_parity.py trains every kind of model over CUDA and CPU ranks of the stand-in driver.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from pipekern.errors import ConfigError
from tests.launch import launch, values
from tests.runtime import foreign, text
from tests.transport import fake_cuda

pytest.importorskip("pipekern._C")


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)]
    if kind == "tied":
        layers[6].weight = layers[0].weight
    if kind == "skip":
        layers[1:1], layers[6:6] = [pk.Skip.save("early")], [pk.Skip.join("early", torch.mul)]
        return pk.Skip(*layers).double()
    return nn.Sequential(*layers).double()


def difference(kind: str, devices: list[str], **options: Any) -> float:
    """The largest difference in loss, norm and parameters to the unsplit module, over three clipped steps of AdamW."""
    net = model(kind)
    reference = copy.deepcopy(net)
    x, y = torch.randn(2, 16, 8, dtype=torch.float64)
    most = 0.0
    with pk.Pipeline(net, loss_fn=nn.MSELoss(), microbatches=4, devices=devices, timeout=30.0, **options) as pipe:
        own = pipe.optimizer(torch.optim.AdamW, lr=0.01)
        whole = torch.optim.AdamW(reference.parameters(), lr=0.01)
        for _ in range(3):
            loss, norm = pipe.train_step(x, y), pipe.clip_grad_norm_(0.1)
            wanted = nn.functional.mse_loss(reference(x), y)
            wanted.backward()
            wanted_norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
            for optimizer in (own, whole):
                optimizer.step()
                optimizer.zero_grad()
            most = max(most, abs(float(loss) - float(wanted.detach())), abs(float(norm) - float(wanted_norm)))
        kinds = {pipe._parts.blueprint.schedule.stage_rank[i]: str(s.device) for i, s in pipe._parts.stages.items()}
        assert kinds == {rank: devices[rank] for rank in kinds}
        there = dict(reference.named_parameters(remove_duplicate=False))
        parts = [(p.detach().cpu() - there[name].detach()).abs().max() for name, p in pipe.named_parameters()]
        evaluated = float(pipe.eval_step(x, y)) - float(nn.functional.mse_loss(reference(x), y).detach())
    return max(most, abs(evaluated), *map(float, parts))


def in_turn(kinds: list[str], devices: list[str], **options: Any) -> list[float]:
    foreign.load()
    if not options.get("transport"):
        del os.environ["RANK"]
    return [difference(kind, devices, **options) for kind in kinds]


@pytest.mark.parametrize(
    "devices",
    [["cpu", foreign.LAZY, "cpu"], pytest.param([foreign.LAZY, "cpu"], marks=pytest.mark.full)],
    ids=["three", "two"],
)
def test_in_one_process(devices: list[str]) -> None:
    (found,) = values(launch(in_turn, 1, ["plain", "skip"], devices))
    assert max(found) < 1e-12


@pytest.mark.parametrize(
    "devices",
    [[foreign.LAZY, "cpu", foreign.LAZY], pytest.param(["cpu", foreign.LAZY], marks=pytest.mark.full)],
    ids=["three", "two"],
)
def test_among_processes(devices: list[str]) -> None:
    for found in values(launch(in_turn_among, len(devices), ["plain", "tied", "skip"], devices)):
        assert max(found) < 1e-12


def in_turn_among(kinds: list[str], devices: list[str]) -> list[float]:
    return in_turn(kinds, devices, transport="shm")


def on_stand_in(name: str, folder: str) -> dict[str, dict[str, Tensor]]:
    """What ranks of both kinds make: in low precision, with a norm over both, after a checkpoint, as text."""
    leaks = fake_cuda.load(name)
    place = {"transport": "shm" if name == "shm" else "cuda"}
    found = {
        "bf16": trained({"precision": "bf16"} | place),
        "clipped": trained({"schedule": "zb-h1"} | place, lr=0.01, max_norm=0.1),
        "saved": resumed(place, folder),
        "text": {"tokens": written(place)},
    }
    assert leaks() == ""
    return found


def trained(options: dict[str, Any], **adamw: Any) -> dict[str, Tensor]:
    with pk.Pipeline(model("tied").float(), loss_fn=nn.MSELoss(), microbatches=4, **options) as pipe:
        steps(pipe, pipe.optimizer(pk.optim.AdamW, **adamw), 3)
        return {name: value.clone() for name, value in pipe.state_dict().items()}


def steps(pipe: pk.Pipeline, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        pipe.train_step(torch.randn(16, 8), torch.randn(16, 8))
        optimizer.step()
        optimizer.zero_grad()


def resumed(options: dict[str, Any], folder: str) -> dict[str, Tensor]:
    """Trained, saved, spoilt, loaded, trained on."""
    with pk.Pipeline(model("tied").float(), loss_fn=nn.MSELoss(), microbatches=4, **options) as pipe:
        optimizer = pipe.optimizer(torch.optim.AdamW)
        steps(pipe, optimizer, 2)
        pipe.save(folder)
        steps(pipe, optimizer, 1)
        pipe.load(folder)
        steps(pipe, optimizer, 1)
        return {name: value.clone() for name, value in pipe.state_dict().items()}


def written(options: dict[str, Any]) -> Tensor:
    with pk.Pipeline(text.build("specs", 0), loss_fn=nn.CrossEntropyLoss(), microbatches=2, **options) as pipe:
        return pipe.generate(torch.arange(6).reshape(2, 3), max_new_tokens=5)


def test_the_same_bits_as_between_two_ranks_on_the_cpu(tmp_path: Path) -> None:
    fake_cuda.library()
    wanted, *others = (
        values(launch(on_stand_in, 2, name, str(tmp_path / name)))
        for name in ("shm", "fake-mixed-odd", "fake-mixed-even")
    )
    for rows in others:
        for rank, parts in enumerate(wanted):
            for part, tensors in parts.items():
                got = rows[rank][part]
                assert got.keys() == tensors.keys() and all(torch.equal(got[key], tensors[key]) for key in got), part


def codecs(name: str, codec: Any) -> Any:
    fake_cuda.load(name)
    try:
        with pk.Pipeline(
            model("plain").float(), loss_fn=nn.MSELoss(), microbatches=2, codec=codec, timeout=20.0
        ) as pipe:
            steps(pipe, pipe.optimizer(torch.optim.SGD), 1)
            return pipe._parts.codecs
    except ConfigError as error:
        return str(error)


def test_a_link_with_an_end_on_the_cpu_does_not_cast() -> None:
    fake_cuda.library()
    for told in values(launch(codecs, 2, "fake-mixed-odd", "bf16")):
        assert "codec='bf16' on link 0>1" in told and "only links between CUDA devices cast" in told
    for chosen in values(launch(codecs, 2, "fake-mixed-even", "auto")):
        assert chosen == {"0>1": "none", "1>0": "none"}


def replicated(name: str) -> dict[str, Tensor]:
    fake_cuda.load(name)
    with pk.Pipeline(
        model("plain").float(),
        loss_fn=nn.MSELoss(),
        microbatches=2,
        mesh={"dp": 2, "pp": 2},
        zero=1,
        transport="shm" if name == "shm" else "cuda",
    ) as pipe:
        steps(pipe, pipe.optimizer(pk.optim.AdamW), 2)
        return {key: value.clone() for key, value in pipe.state_dict().items()}


def test_replicas_of_a_pipeline_over_both_kinds() -> None:
    """The first rank of each pipeline is on a device, the second on the CPU."""
    fake_cuda.library()
    wanted, got = (values(launch(replicated, 4, name)) for name in ("shm", "fake-mixed-odd"))
    for own, other in zip(wanted, got, strict=True):
        assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
