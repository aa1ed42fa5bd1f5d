"""What save_pretrained writes is what transformers itself writes and reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pipekern as pk
from tests.runtime.huggingface import MODELS, loss_fn
from tests.runtime.step import run, union

SAMPLE = [("gpt-2", True), ("mixtral", False)]  # a weight that is tied; weights that files hold in other shapes
CASES = [
    pytest.param(name, processes, marks=() if (name, processes) in SAMPLE else pytest.mark.full)
    for name in MODELS
    for processes in (False, True)
]


def _train(ranks: int, name: str, seed: int, folder: str) -> dict[str, Tensor]:
    """A step, then the state that was written."""
    torch.manual_seed(seed)
    model = MODELS[name].build()
    with pk.Pipeline(model, loss_fn=loss_fn, microbatches=2, ranks=ranks, inputs=MODELS[name].inputs) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
        x, y = MODELS[name].batch(4)
        x = x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
        pipe.train_step(x, y)
        optimizer.step()
        pipe.save_pretrained(folder)
        return {key: value.clone() for key, value in pipe.state_dict().items()}


@pytest.mark.parametrize(("name", "processes"), CASES)
def test_transformers_reads_it(name: str, processes: bool, seed: int, tmp_path: Path) -> None:
    """The same weights come back, and the files have the names and tensors of transformers' own save."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    state = union(run(processes, _train, 2, name, seed, str(ours)))
    model: Any = MODELS[name].build()
    loaded = type(model).from_pretrained(ours).state_dict()
    assert loaded.keys() == state.keys()
    assert [key for key in state if not torch.equal(loaded[key], state[key])] == []
    model.load_state_dict(state)
    model.save_pretrained(theirs)
    assert _names(ours) == _names(theirs)
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    one, other = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _refused(ranks: int, folder: str) -> str:
    with pk.Pipeline(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), loss_fn=nn.MSELoss(), microbatches=1, ranks=ranks
    ) as pipe:
        with pytest.raises(pk.ConfigError) as refusal:
            pipe.save_pretrained(folder)
        pipe.train_step(torch.ones(2, 2), torch.ones(2, 2))
        return str(refusal.value)


@pytest.mark.parametrize("processes", [False, True], ids=["one-process", "processes"])
def test_other_models_are_refused(processes: bool, tmp_path: Path) -> None:
    for text in run(processes, _refused, 2, str(tmp_path)):
        assert "save_pretrained of a Sequential, which has no config" in text
        assert "use save" in text
    assert list(tmp_path.iterdir()) == []
