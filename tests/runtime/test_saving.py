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


# -- what is refused


def _perceptron(ranks: int, **options: Any) -> pk.Pipeline:
    layers: list[nn.Module] = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]
    defaults: dict[str, Any] = {"loss_fn": F.mse_loss, "microbatches": 2, "ranks": ranks, "timeout": 20.0}
    return pk.Pipeline(options.pop("model", nn.Sequential(*layers)), **defaults | options)


def _refused(ranks: int, folder: str) -> list[str]:
    """What loading into pipelines that do not fit says; each is as it was afterwards, and goes on."""
    torch.manual_seed(0)
    with _perceptron(ranks) as pipe:
        pipe.optimizer(torch.optim.AdamW, lr=0.1)
        pipe.save(folder, None)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    models: list[tuple[nn.Module, dict[str, Any], Any]] = [
        (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4).double(), nn.Linear(4, 4)), {}, torch.optim.AdamW),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.PReLU(4)), {}, torch.optim.AdamW),
        (tied, {"seed": 7}, torch.optim.SGD),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), {}, None),
    ]
    texts = []
    for model, options, optimizer in models:
        with _perceptron(ranks, model=model, **options) as pipe:
            if optimizer is not None:
                pipe.optimizer(optimizer, lr=0.1)
            before = {name: value.clone() for name, value in pipe.state_dict().items()}, torch.get_rng_state()
            with pytest.raises(pk.CheckpointError) as refusal:
                pipe.load(folder)
            texts.append(str(refusal.value))
            assert all(torch.equal(value, before[0][name]) for name, value in pipe.state_dict().items())
            assert torch.equal(torch.get_rng_state(), before[1])
            if options:
                pipe.train_step(torch.ones(4, 4), torch.ones(4, 4))
    return texts


@PLACES
def test_every_difference_is_listed_and_nothing_changes(processes: bool, tmp_path: Path) -> None:
    results = run(processes, _refused, 2, str(tmp_path))
    assert all(texts == results[0] for texts in results), "the ranks say different things"
    shapes, names, others, without = results[0]
    assert "0.weight is float32 [4, 4] in the checkpoint, float32 [5, 4] here" in shapes
    assert "0.bias is float32 [4] in the checkpoint, float32 [5] here" in shapes
    assert "1.weight is float32 [4, 4] in the checkpoint, float64 [4, 5] here" in shapes
    assert "2.weight" not in shapes
    assert "1.bias is in the checkpoint, not in the model" in names
    assert "2.bias is in the checkpoint, not in the model" in names
    assert "2.weight is float32 [4, 4] in the checkpoint, float32 [4] here" in names
    assert "2.weight is tied to nothing in the checkpoint, to 0.weight here" in others
    assert "seed is 0 in the checkpoint, 7 here" in others
    assert "the optimizer is AdamW in the checkpoint, SGD here" in others
    assert "the checkpoint has the state of AdamW, this pipeline has no optimizer" in without


def _damage(folder: str, path: str) -> tuple[str, bool, float]:
    """What loading a damaged checkpoint says; whether nothing changed; the loss of a step after that."""
    torch.manual_seed(1)
    with _perceptron(2, split=[1, 2]) as pipe:
        before = {name: value.clone() for name, value in pipe.state_dict().items()}
        with pytest.raises(pk.CheckpointError) as refusal:
            pipe.load(folder)
        same = all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())
        return str(refusal.value), same, float(pipe.train_step(torch.ones(4, 4), torch.ones(4, 4)))


def test_what_one_rank_finds_damaged_no_rank_loads(tmp_path: Path) -> None:
    """And the pipelines go on as they were."""
    with _perceptron(2) as pipe:
        pipe.save(tmp_path)
    (path,) = tmp_path.rglob("unit-00000.safetensors")  # rank 0 alone reads it
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)
    one, other = values(launch(_damage, 2, str(tmp_path), str(path)))
    assert one == other
    text, same, _ = one
    assert text.startswith("rank 0: the checkpoint is damaged")
    assert str(path) in text
    assert "rank 1" not in text
    assert same


def _fail(folder: str) -> list[Any]:
    """A save with data that JSON cannot say on one rank, then one that is good."""
    with _perceptron(2) as pipe:
        pipe.save(folder, 1)
        rank = pipe._parts.rank
        with pytest.raises(pk.CheckpointError) as refusal:
            pipe.save(folder, {"seen": {1, 2}} if rank == 1 else None)
        kept = pipe.load(folder)
        pipe.train_step(torch.ones(4, 4), torch.ones(4, 4))
        pipe.save(folder, [rank, 2.5])
        return [str(refusal.value), kept, pipe.load(folder)]


def test_a_failed_save_leaves_the_last_one_and_the_pipeline(tmp_path: Path) -> None:
    """Each rank gets its own data back."""
    one, other = values(launch(_fail, 2, str(tmp_path)))
    assert one[0] == other[0]
    assert one[0].startswith("rank 1: values['data']['seen'] is a set")
    assert one[1:] == [1, [0, 2.5]]
    assert other[1:] == [1, [1, 2.5]]


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
    with _perceptron(2, model=Scaled()) as pipe, _perceptron(4, model=Scaled()) as other:
        for unit in other._parts.units():
            unit.train._buffers.update({name: value.clone() for name, value in unit.train.named_buffers()})
        x, y = torch.randn(4, 4), torch.randn(4, 4)
        pipe.save(tmp_path)
        other.load(tmp_path)
        assert torch.equal(other.train_step(x, y), pipe.train_step(x, y))
    assert [entry.file[:10] for key, entry in Checkpoint(tmp_path).entries.items() if "scale" in key] == ["unit-00000"]


class Extra(nn.Linear):
    """A layer with state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("not reached")


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Extra(4, 4))
    with _perceptron(2, model=model) as pipe, pytest.raises(pk.CheckpointError, match=r"1\._extra_state"):
        pipe.save(tmp_path)


def test_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    with _perceptron(1) as pipe, pytest.raises(pk.CheckpointError, match="no save into it was ever finished"):
        pipe.load(tmp_path)
