"""What cannot be saved or loaded is said on all ranks, and nothing has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pipekern as pk
from tests.launch import launch, values
from tests.runtime.step import PLACES, run


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
    texts, weights = [], []
    for model, options, optimizer in models:
        with _perceptron(ranks, model=model, **options) as pipe:
            if optimizer is not None:
                pipe.optimizer(optimizer, lr=0.1)
            before = {name: value.clone() for name, value in pipe.state_dict().items()}, torch.get_rng_state()
            with pytest.raises(pk.CheckpointError) as refusal:
                pipe.load(folder)
            texts.append(str(refusal.value))
            if model is not models[-1][0]:
                with pytest.raises(pk.CheckpointError) as refusal:
                    pipe.load_weights(folder)
                weights.append(str(refusal.value))
            assert all(torch.equal(value, before[0][name]) for name, value in pipe.state_dict().items())
            assert torch.equal(torch.get_rng_state(), before[1])
            if options:
                pipe.train_step(torch.ones(4, 4), torch.ones(4, 4))
    return texts + weights


@PLACES
def test_every_difference_is_listed_and_nothing_changes(processes: bool, tmp_path: Path) -> None:
    results = run(processes, _refused, 2, str(tmp_path))
    assert all(texts == results[0] for texts in results), "the ranks say different things"
    shapes, names, others, without, *weights = results[0]
    for text, all_of_it in zip(weights, (shapes, names, others), strict=True):
        lines, every = text.splitlines(), all_of_it.splitlines()
        assert [line for line in every if line in lines] == lines, "load_weights refuses the same of weights"
        assert not [line for line in lines if "seed" in line or "optimizer" in line]
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
    assert "pipe.load_weights" in without


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


def _fail(folder: str, transport: str) -> list[Any]:
    """A save with data that JSON cannot say on one rank, then one that is good, and large."""
    with _perceptron(2, transport=transport) as pipe:
        pipe.save(folder, 1)
        rank = pipe._parts.rank
        with pytest.raises(pk.CheckpointError) as refusal:
            pipe.save(folder, {"seen": {1, 2}} if rank == 1 else None)
        kept = pipe.load(folder)
        pipe.train_step(torch.ones(4, 4), torch.ones(4, 4))
        pipe.save(folder, [rank, 2.5, "x" * 3_000_000])
        return [str(refusal.value), kept, pipe.load(folder)[:2]]


@pytest.mark.parametrize("transport", ["shm", "dist"])
def test_a_failed_save_leaves_the_last_one_and_the_pipeline(transport: str, tmp_path: Path) -> None:
    """Each rank gets its own data back."""
    one, other = values(launch(_fail, 2, str(tmp_path), transport))
    assert one[0] == other[0]
    assert one[0].startswith("rank 1: values['data']['seen'] is a set")
    assert one[1:] == [1, [0, 2.5]]
    assert other[1:] == [1, [1, 2.5]]


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
