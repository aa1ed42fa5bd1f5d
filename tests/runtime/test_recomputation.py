"""``recompute="auto"``: measured costs, a limit, and what is recomputed of which unit."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import nn

import pipekern as pk
from pipekern.runtime.footprint import Made
from pipekern.runtime.recomputation import _ways
from pipekern.stage.recompute import CHOICES
from pipekern.stage.stage import detached
from pipekern.transport.value import map_tensors
from tests.launch import launch, values
from tests.runtime.models import KINDS, build
from tests.runtime.parity import same_bits
from tests.runtime.step import PLACES, gradients, run

BLOCKS = 6


def _costs(**changed: Any) -> pk.LayerCosts:
    """Of six equal layers: each keeps 1000 bytes, or 100 if it runs again, which takes 3 µs; round numbers."""
    names, equal = tuple(map(str, range(BLOCKS))), (3.0,) * BLOCKS
    kept, added = ((1000, 600, 100),) * BLOCKS, ((0, 2, 3),) * BLOCKS
    nothing, outputs = (0,) * BLOCKS, (64,) * BLOCKS
    costs = pk.LayerCosts(
        names, equal, equal, equal, kept=kept, added=added, waiting=nothing, outputs=outputs, ends=nothing
    )
    return replace(costs, **changed)


def _net() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(BLOCKS)))


def _chosen(**options: Any) -> list[list[str]]:
    given: dict[str, Any] = {"loss_fn": nn.MSELoss(), "microbatches": 4, "ranks": 2, "recompute": "auto"}
    with pk.Pipeline(_net(), **given | {"split": _costs()} | options) as pipe:
        return pipe._parts.blueprint.recompute


def test_golden() -> None:
    """1f1b on two ranks: rank 0 holds two micro-batches of three layers, 6000 bytes; rank 1 one, 3000.

    Three weights of 4 × 4 with gradient and two moments take 768 bytes, and the slots of messages 64 each. A layer that
    runs again has all of its 1000 meanwhile.
    """
    slots = pk.schedule.build("1f1b", ranks=2, microbatches=4).program().slots
    rings = [64 * slots[1, 0], 64 * slots[0, 1]]
    assert _chosen(memory=[6768 + rings[0], 3768 + rings[1]]) == [["none"] * 3] * 2
    first, second = _chosen(memory=[6767 + rings[0], 3767 + rings[1]])
    assert sorted(first) == ["none", "none", "selective"]  # 2 · (1000 + 1000 + 600) + 400
    assert sorted(second) == ["none", "selective", "selective"]  # 1000 + 600 + 600 + 400; one alone would have 3000
    first, second = _chosen(memory=[2268 + rings[0], 1968 + rings[1]])
    assert first == ["full"] * 3  # 2 · 300 + 900
    assert sorted(second) == ["full", "full", "full"]
    assert _chosen(memory=1e9) == [["none"] * 3] * 2


def test_what_is_chosen_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pipekern")
    _chosen(memory=1e9)
    assert "recompute='auto' chooses stage 0: none none none; stage 1: none none none" in caplog.messages


def _footprints(kind: str, seed: int) -> tuple[pk.LayerCosts, list[list[list[int]]]]:
    """Costs, and ``bytes[choice][stage]`` that a stage of a pipeline holds after a forward."""
    torch.manual_seed(seed)
    batch = KINDS[kind].batch(40)
    costs, held = pk.profile(build(kind, seed), batch.x, repeats=1), []
    options: dict[str, Any] = {"loss_fn": KINDS[kind].loss_fn, "microbatches": 1, "ranks": 3, "split": costs}
    for how in CHOICES:
        with pk.Pipeline(build(kind, seed), recompute=how, **options) as pipe:
            value, row = batch.x, []
            for stage in pipe._parts.stages.values():
                with Made() as made:
                    output = stage.forward(0, value, 0)
                row.append([made.alive(), len(stage.units)])
                value = detached(map_tensors(torch.clone, output))
            held.append(row)
    return costs, held


@pytest.mark.parametrize("kind", KINDS)
def test_stages_hold_what_is_predicted(kind: str, seed: int) -> None:
    """Within 2 %: saved by autograd, by checkpoints, as outputs for the next stage."""
    costs, held = _footprints(kind, seed)
    for choice, row in enumerate(held):
        first = 0
        for got, units in row:
            ways = [_ways(costs, first + i, i == 0, i == units - 1).ways[choice] for i in range(units)]
            assert sum(way.kept for way in ways) == pytest.approx(got, rel=0.02), (CHOICES[choice], first)
            first += units


def test_costs_of_a_block() -> None:
    """Selective keeps less than none, full less than selective; weight work waits for inputs and gradients."""
    torch.manual_seed(0)
    costs = pk.profile(build("gpt", 0), KINDS["gpt"].batch(40).x, repeats=1)
    none, selective, full = costs.kept[2]
    assert none > selective > full > 0
    assert costs.added[2][0] == 0
    assert costs.waiting[2] > full and costs.outputs[2] > 0
    assert pk.LayerCosts.read(asdict(costs)) == costs


def _trained(ranks: int, kind: str, seed: int, costs: pk.LayerCosts, options: dict[str, Any]) -> tuple[Any, ...]:
    torch.manual_seed(seed)
    data = KINDS[kind].batch(8)
    model: Any = build(kind, seed)
    given = {"loss_fn": KINDS[kind].loss_fn, "microbatches": 4, "split": costs, **options}
    with pk.Pipeline(model, ranks=ranks, seed=seed, **given) as pipe:
        loss = pipe.train_step(*data)
        state = {name: value.clone() for name, value in pipe.state_dict().items()}
        return pipe._parts.blueprint.recompute, (loss, gradients(pipe), state)


@PLACES
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_the_same_bits_whatever_is_chosen(processes: bool, schedule: str, seed: int) -> None:
    """The limit tightened from all to nearly the least: more units turn, all ranks choose alike, no bit changes."""
    kind = "gpt"
    torch.manual_seed(seed)
    costs = pk.profile(build(kind, seed), KINDS[kind].batch(2).x, repeats=1)
    costs = replace(costs, added=((0.0, 5.0, 1.0),) * len(costs.names))  # as if nobody else used the machine
    plain = run(processes, _trained, 2, kind, seed, costs, {"schedule": schedule})
    counts = []
    least = _least(kind, seed, costs, schedule)
    for memory in (1e9, 1.001 * least) if processes else (1e9, 2.0 * least, 1.2 * least, 1.001 * least):
        options = {"schedule": schedule, "recompute": "auto", "memory": memory}
        rows = run(processes, _trained, 2, kind, seed, costs, options)
        assert all(chosen == rows[0][0] for chosen, _ in rows)
        for (_, got), (_, want) in zip(rows, plain, strict=True):
            assert same_bits(got, want)
        counts.append(sum(how != "none" for hows in rows[0][0] for how in hows))
    assert counts[0] == 0 < counts[-1] and counts == sorted(counts), counts


def _least(kind: str, seed: int, costs: pk.LayerCosts, schedule: str) -> float:
    """The least limit that is accepted, within a thousandth."""
    low, high = 1.0, 1e9
    options: dict[str, Any] = {"loss_fn": KINDS[kind].loss_fn, "microbatches": 4, "ranks": 2, "schedule": schedule}
    while high > 1.001 * low:
        middle = (low * high) ** 0.5
        try:
            pk.Pipeline(build(kind, seed), split=costs, recompute="auto", memory=middle, **options).close()
            high = middle
        except pk.ConfigError as error:
            assert "more than its" in str(error)
            low = middle
    return high


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"split": None}, ["pk.profile", "'none', 'selective' or 'full'"]),
        ({"split": pk.LayerCosts.given([1] * BLOCKS)}, ["pk.profile"]),
        ({"memory": 100}, ["rank 0 needs", "rank 1 needs", "more than its 100 bytes", "smaller micro-batches"]),
        ({"memory": 0}, ["memory=0", "above 0"]),
        ({"memory": [1e6, 1e6, 1e6]}, ["[1000000.0, 1000000.0, 1000000.0]", "2 numbers"]),
        ({"memory": 1e6, "recompute": "full"}, ["memory=1000000.0", "recompute='full'", "recompute='auto'"]),
    ],
    ids=["no costs", "no bytes", "too little", "nothing", "three", "full"],
)
def test_refused(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(pk.ConfigError) as refusal:
        _chosen(**options)
    assert [part for part in parts if part not in str(refusal.value)] == [], str(refusal.value)


def test_frozen_weights_take_less() -> None:
    """No gradient and no moments: 64 bytes a layer, not 256."""
    net = _net().requires_grad_(False)
    net[-1].requires_grad_(True)
    options: dict[str, Any] = {"loss_fn": nn.MSELoss(), "microbatches": 1, "ranks": 1, "split": _costs()}
    pk.Pipeline(net, recompute="auto", memory=6000 + 5 * 64 + 256, **options).close()
    with pytest.raises(pk.ConfigError, match="needs"):
        pk.Pipeline(_net(), recompute="auto", memory=6 * 100 + 900 + 6 * 256 - 1, **options)


def _on_free_memory(ranks: int) -> list[list[str]]:
    return _chosen(ranks=ranks)


@PLACES
def test_the_machine_has_enough_for_a_small_model(processes: bool) -> None:
    for chosen in run(processes, _on_free_memory, 2):
        assert chosen == [["none"] * 3] * 2


def _bad_devices(ranks: int) -> str:
    try:
        _chosen(ranks=ranks, devices=["cpu"] * 3)
    except pk.ConfigError as error:
        return str(error)
    return ""


def test_what_is_wrong_on_every_rank_is_still_told() -> None:
    assert all("3 entries" in text for text in values(launch(_bad_devices, 2, 2)))
