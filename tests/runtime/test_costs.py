"""``LayerCosts``: the file they are kept in, and the model they are of."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pipekern as pk
from pipekern.cli import main
from pipekern.plan.cluster import Cluster, Device, Link
from pipekern.plan.cost import Layer, read
from pipekern.plan.toml import load
from pipekern.runtime.costs import DeviceTimes

COSTS = pk.LayerCosts(
    names=("0", "1"),
    forward=(10.0, 20.5),
    backward=(20.0, 30.0),
    weight=(5.0, 0.0),
    copy=(1.0, 2.0),
    kept=((100, 60, 20), (200, 200, 40)),
    added=((0.0, 4.5, 10.0), (0.0, 0.0, 20.5)),
    waiting=(50, 0),
    outputs=(16, 32),
    ends=(0, 8),
    saved=(0, 16),
    parameters=(20, 0),
    samples=4,
    cluster=Cluster((Device(1.0, 1e9, name="a"), Device(2.5, name="b")), (Link(3.0, 1e9),)),
    others=(DeviceTimes("b", (4.0, 8.2), (8.0, 12.0), (2.0, 0.0)),),
)


def test_golden_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.toml"
    COSTS.save(path)
    assert path.read_text().partition("samples =")[2].splitlines()[:3] == [
        " 4",
        "layers = [",
        '  { name = "0", forward = 10.0, backward = 20.0, weight = 5.0, parameters = 20, activations = 100, '
        "output = 16, copy = 1.0, waiting = 50, end = 0, saved = 0, selective = [60, 4.5], full = [20, 10.0] },",
    ]
    assert pk.LayerCosts.load(path) == COSTS == pk.LayerCosts.read(asdict(COSTS))
    assert read(load(path)).layers(8, Device(1.0))[0] == Layer("0", 20, 40, 10, 20, 200, 32)
    assert Cluster.from_dict(load(path)) == COSTS.cluster


def test_a_measured_profile_can_be_planned_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.toml"
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    costs = pk.profile(model, torch.randn(2, 8), devices=["cpu", "cpu"], repeats=1)
    costs.save(path)
    assert pk.LayerCosts.load(path) == costs
    assert (
        costs.parameters == (72,) * 4 and costs.samples == 2 and len(set(costs.forward[1:])) == 1
    )  # the first gives no gradient
    assert costs.cluster is not None and costs.cluster.ranks == 2 and costs.cluster.links[0].bandwidth > 0
    arguments = ["--samples", "8", "--schedules", "1f1b", "--json"]
    assert main(["plan", "--model", str(path), "--cluster", str(path), *arguments]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert sum(plan["split"]) == 4 and [row["device"] for row in plan["ranks"]] == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("names", "parameters", "text"),
    [
        (("0", "x"), (20, 0), "'x' of 0 parameters is '1' of 0 here"),
        (("0", "1"), (30, 0), "'0' of 30 parameters is '0' of 20 here"),
        (("0", "1", "2"), (20, 0, 0), "costs of 3 units, the model has 2"),
    ],
)
def test_a_profile_of_another_model(names: tuple[str, ...], parameters: tuple[int, ...], text: str) -> None:
    costs = replace(COSTS, names=names, parameters=parameters)
    options: dict[str, Any] = {"loss_fn": nn.MSELoss(), "microbatches": 1, "ranks": 2, "split": costs}
    with pytest.raises(pk.ConfigError, match=text + ".*profile this model"):
        pk.Pipeline(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), **options)


def test_only_some_of_what_differs_is_said() -> None:
    costs = replace(pk.LayerCosts.given([1] * 6), parameters=(7,) * 6)
    with pytest.raises(pk.ConfigError, match=r"'2' of 7 parameters is '2' of 20 here; 3 more; profile this model"):
        pk.Pipeline(
            nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))), loss_fn=nn.MSELoss(), microbatches=1, split=costs
        )


@pytest.mark.parametrize("text", ["samples = 1\n", "layers = [1]\n", "layers = [{ name = 'a' }]\n"])
def test_files_that_are_no_profile(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.toml"
    path.write_text(text)
    with pytest.raises(pk.ConfigError, match=r"other.toml is no profile .*give a file"):
        pk.LayerCosts.load(path)


def test_given_costs_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(pk.ConfigError, match="given, not measured"):
        pk.LayerCosts.given([1, 2]).save(tmp_path / "profile.toml")
