"""A pipeline's checkpoint holds all that training goes on from, for any ranks, split and schedule."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from pipekern.checkpoint.load import Checkpoint
from tests.launch import launch, values
from tests.runtime.models import KINDS, batches, build
from tests.runtime.step import PLACES, run, union

MICROBATCHES = 4


class Layout(NamedTuple):
    """How a model of eight units or more lies on ranks; ``split`` None: by estimated costs."""

    ranks: int
    schedule: str = "1f1b"
    split: list[int] | None = None


LAYOUTS = [
    Layout(1, "gpipe"),
    Layout(2),
    Layout(2, "zb-v"),
    Layout(2, "interleaved-1f1b"),
    Layout(3, "zb-h1"),
    Layout(3, "looped-bfs"),
    Layout(4, "gpipe"),
    Layout(4, "v-half"),
]
EIGHT_UNITS = [
    Layout(1, "1f1b", [8]),
    Layout(2, "1f1b", [1, 7]),
    Layout(3, "gpipe", [6, 1, 1]),
    Layout(4, "1f1b", [1, 5, 1, 1]),
    Layout(2, "zb-v", [2, 4, 1, 1]),
]


def test_golden_checkpoint(tmp_path: Path) -> None:
    """What is where, with two ranks; then three ranks go on from it."""

    def pipeline(ranks: int) -> tuple[pk.Pipeline, torch.optim.Optimizer]:
        pipe = pk.Pipeline(
            nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.BatchNorm1d(3)),
            loss_fn=F.mse_loss,
            microbatches=1,
            ranks=ranks,
        )
        return pipe, pipe.optimizer(torch.optim.AdamW, lr=0.1)

    x, y = torch.randn(4, 2), torch.randn(4, 3)
    pipe, optimizer = pipeline(2)
    pipe.train_step(x, y)
    optimizer.step()
    optimizer.zero_grad()
    pipe.save(tmp_path, {"epoch": 3, "batch": 1})
    checkpoint = Checkpoint(tmp_path)
    assert {key: (entry.file[:10], str(entry)) for key, entry in checkpoint.entries.items()} == {
        "model/0.weight": ("unit-00000", "float32 [3, 2]"),
        "model/0.bias": ("unit-00000", "float32 [3]"),
        "optimizer/0.weight/step": ("unit-00000", "float32 []"),
        "optimizer/0.weight/exp_avg": ("unit-00000", "float32 [3, 2]"),
        "optimizer/0.weight/exp_avg_sq": ("unit-00000", "float32 [3, 2]"),
        "optimizer/0.bias/step": ("unit-00000", "float32 []"),
        "optimizer/0.bias/exp_avg": ("unit-00000", "float32 [3]"),
        "optimizer/0.bias/exp_avg_sq": ("unit-00000", "float32 [3]"),
        "model/2.weight": ("unit-00002", "float32 [3]"),
        "model/2.bias": ("unit-00002", "float32 [3]"),
        "model/2.running_mean": ("unit-00002", "float32 [3]"),
        "model/2.running_var": ("unit-00002", "float32 [3]"),
        "model/2.num_batches_tracked": ("unit-00002", "int64 []"),
        "optimizer/2.weight/step": ("unit-00002", "float32 []"),
        "optimizer/2.weight/exp_avg": ("unit-00002", "float32 [3]"),
        "optimizer/2.weight/exp_avg_sq": ("unit-00002", "float32 [3]"),
        "optimizer/2.bias/step": ("unit-00002", "float32 []"),
        "optimizer/2.bias/exp_avg": ("unit-00002", "float32 [3]"),
        "optimizer/2.bias/exp_avg_sq": ("unit-00002", "float32 [3]"),
        "random/0/cpu": ("random-000", "uint8 [5056]"),
    }
    (row,) = checkpoint.values
    assert (row["step"], row["seed"], row["data"], row["ties"]) == (1, 0, {"epoch": 3, "batch": 1}, {})
    assert row["optimizer"]["names"] == [["0.weight", "0.bias", "2.weight", "2.bias"]]
    assert row["optimizer"]["groups"][0]["lr"] == 0.1

    want = pipe.train_step(x, y)
    other, _ = pipeline(3)
    assert other.load(tmp_path) == {"epoch": 3, "batch": 1}
    assert torch.equal(other.train_step(x, y), want)


def _weights_alone(ranks: int, folder: str) -> list[Any]:
    """Saved after a step of AdamW; taken by a pipeline that has never stepped, and by one of another optimizer, split
    and seed.
    """
    x, y = torch.ones(4, 2), torch.ones(4, 3)

    def pipeline(**options: Any) -> pk.Pipeline:
        net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
        return pk.Pipeline(net, loss_fn=F.mse_loss, microbatches=2, ranks=ranks, timeout=20.0, **options)

    def step(pipe: pk.Pipeline, optimizer: torch.optim.Optimizer) -> Tensor:
        pipe.train_step(x, y)
        optimizer.step()
        optimizer.zero_grad()
        return pipe.eval_step(x, y)

    with pipeline() as pipe:
        want = step(pipe, pipe.optimizer(torch.optim.AdamW, lr=0.1))
        pipe.save(folder, "data")
    with pipeline() as plain:
        found = [plain.load_weights(folder), torch.equal(plain.eval_step(x, y), want)]
    with pipeline(split=[1, 2], seed=5) as other:
        optimizer = other.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
        step(other, optimizer)
        before, random = [state["momentum_buffer"].clone() for state in optimizer.state.values()], torch.get_rng_state()
        found += [other.load_weights(folder), torch.equal(other.eval_step(x, y), want)]
        after = [state["momentum_buffer"] for state in optimizer.state.values()]
        found += [all(map(torch.equal, before, after)), torch.equal(random, torch.get_rng_state()), other._step]
    return found


@PLACES
def test_weights_alone(processes: bool, tmp_path: Path) -> None:
    """Whatever the checkpoint knows of optimizer, seed and steps; those of the pipeline stay."""
    for found in run(processes, _weights_alone, 2, str(tmp_path)):
        assert found == ["data", True, "data", True, True, True, 1]


class State(NamedTuple):
    """All that a checkpoint must bring back, of one process."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    step: int
    data: Any


def _state(pipe: pk.Pipeline, optimizer: torch.optim.Optimizer, data: Any) -> State:
    moments = {
        f"{name}/{key}": value for name, p in pipe.named_parameters() for key, value in optimizer.state[p].items()
    }
    groups = {f"group {i}/{k}": v for i, g in enumerate(optimizer.param_groups) for k, v in g.items() if k != "params"}
    model = {name: value.clone() for name, value in pipe.state_dict().items()}
    return State(model, moments | groups, pipe._step, data)


def _pipeline(kind: str, layout: Layout, seed: int) -> tuple[pk.Pipeline, torch.optim.Optimizer]:
    ranks, schedule, split = layout
    pipe = pk.Pipeline(
        build(kind, seed), loss_fn=KINDS[kind].loss_fn, microbatches=MICROBATCHES, ranks=ranks, schedule=schedule,
        split=split, timeout=20.0,
    )  # fmt: skip
    return pipe, pipe.optimizer(torch.optim.AdamW, lr=1e-2)


def _save(folder: str, kind: str, layout: Layout, seed: int) -> State:
    """Train two steps and save."""
    pipe, optimizer = _pipeline(kind, layout, seed)
    with pipe:
        for batch in batches(KINDS[kind], seed, 2 * MICROBATCHES, 2):
            pipe.train_step(*batch)
            optimizer.step()
            optimizer.zero_grad()
        pipe.save(folder, {"seen": 2})
        return _state(pipe, optimizer, {"seen": 2})


def _load(folder: str, kind: str, layout: Layout, seed: int) -> State:
    """From other weights."""
    pipe, optimizer = _pipeline(kind, layout, seed + 1)
    with pipe:
        return _state(pipe, optimizer, pipe.load(folder))


def _whole(states: Sequence[State]) -> State:
    model, moments = union([state.model for state in states]), union([state.optimizer for state in states])
    assert len({state.step for state in states}) == 1
    return State(model, moments, states[0].step, states[0].data)


def _same(a: State, b: State) -> None:
    for one, other in ((a.model, b.model), (a.optimizer, b.optimizer)):
        assert one.keys() == other.keys()
        wrong = [name for name in one if not _equal(one[name], other[name])]
        assert wrong == [], wrong
    assert (a.step, a.data) == (b.step, b.data) == (2, {"seen": 2})


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and a == b


def _check(kind: str, saved: Sequence[Layout], loaded: Sequence[tuple[int, Layout]], seed: int, folder: Path) -> None:
    """``loaded``: what the checkpoint of which of ``saved`` is loaded as."""
    states = [_save(str(folder / str(i)), kind, layout, seed) for i, layout in enumerate(saved)]
    for i, layout in loaded:
        _same(_load(str(folder / str(i)), kind, layout, seed), states[i])


@pytest.mark.parametrize("kind", list(KINDS))
def test_layouts_in_one_process(kind: str, seed: int, tmp_path: Path) -> None:
    """Each layout loads what another has saved, bit for bit."""
    layouts = [*LAYOUTS, *EIGHT_UNITS] if kind == "tied gpt" else random.sample(LAYOUTS, 3)
    following = [*layouts[1:], layouts[0]]
    _check(kind, layouts, list(enumerate(following)), seed, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", list(KINDS))
def test_all_pairs_of_layouts_in_one_process(kind: str, seed: int, tmp_path: Path) -> None:
    layouts = [*LAYOUTS, *EIGHT_UNITS] if kind in ("gpt", "tied gpt") else LAYOUTS
    _check(kind, layouts, list(product(range(len(layouts)), layouts)), seed, tmp_path)


def _on_processes(worker: Any, folder: Path, kind: str, layout: Layout, seed: int) -> State:
    return _whole(values(launch(worker, layout.ranks, str(folder), kind, layout, seed)))


def test_layouts_among_processes(seed: int, tmp_path: Path) -> None:
    """The weight that is tied is on two ranks, and in one file."""
    chain = [Layout(2), Layout(3, "1f1b", [6, 1, 1]), Layout(2, "zb-v"), Layout(1)]
    for number, (one, other) in enumerate(pairwise(chain)):
        saved = _on_processes(_save, tmp_path / str(number), "tied gpt", one, seed)
        assert Checkpoint(tmp_path / str(number)).values[0]["ties"] == {"head.weight": "embed.weight"}
        assert "model/head.weight" not in Checkpoint(tmp_path / str(number)).entries
        _same(_on_processes(_load, tmp_path / str(number), "tied gpt", other, seed), saved)
        _same(_load(str(tmp_path / str(number)), "tied gpt", other, seed), saved)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["tied gpt", "batchnorm", "lazy"])
def test_all_pairs_of_layouts_among_processes(kind: str, seed: int, tmp_path: Path) -> None:
    for i, one in enumerate(LAYOUTS):
        saved = _on_processes(_save, tmp_path / str(i), kind, one, seed)
        for other in LAYOUTS:
            _same(_on_processes(_load, tmp_path / str(i), kind, other, seed), saved)


def test_no_file_is_a_pickle(seed: int, tmp_path: Path) -> None:
    _on_processes(_save, tmp_path, "tied gpt", Layout(2), seed)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        data = path.read_bytes()
        assert not data.startswith((b"PK", b"\x80"))  # torch.save's archive, and a pickle of protocol 2 or later
        if path.suffix == ".json":
            json.loads(data)
        else:  # nothing in it but a header in JSON, and the bytes of tensors
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            assert len(data) == 8 + length + max(entry["data_offsets"][1] for entry in header.values())


class Scaled(nn.Module):
    """Its buffer is used by three units."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.scale: Tensor
        self.register_buffer("scale", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * self.scale
        return x


def test_a_buffer_of_several_units(seed: int, tmp_path: Path) -> None:
    """Saved once, and given to each of them, also where each has a copy (a move to another device makes them)."""
    pipe, other = (pk.Pipeline(Scaled(), loss_fn=F.mse_loss, microbatches=2, ranks=ranks) for ranks in (2, 4))
    with pipe, other:
        for unit in other._parts.units():
            unit.train._buffers.update({name: value.clone() for name, value in unit.train.named_buffers()})
        x, y = torch.randn(4, 4), torch.randn(4, 4)
        pipe.save(tmp_path)
        other.load(tmp_path)
        assert torch.equal(other.train_step(x, y), pipe.train_step(x, y))
    assert [entry.file[:10] for key, entry in Checkpoint(tmp_path).entries.items() if "scale" in key] == ["unit-00000"]
