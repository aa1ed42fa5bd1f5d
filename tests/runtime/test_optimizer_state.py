"""The state of torch's optimizers moves with the parameters, and training goes on as if nothing had been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.runtime.models import KINDS, batches

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "AdamW, its rate a tensor": (torch.optim.AdamW, {"lr": torch.tensor(0.01), "foreach": False}),
    "AdamW, fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    "AdamW, another one's tuple": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.99)}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "Rprop": (torch.optim.Rprop, {}),
    "ASGD": (torch.optim.ASGD, {}),
}


def _pipe(ranks: int, seed: int) -> pk.Pipeline:
    torch.manual_seed(seed)
    model = KINDS["perceptron"].build().double()
    return pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=2, ranks=ranks)


def _steps(pipe: pk.Pipeline, optimizer: torch.optim.Optimizer, data: list[Any]) -> list[Tensor]:
    losses = []
    for batch in data:
        losses.append(pipe.train_step(*batch))
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, *(p.detach().clone() for p in pipe.parameters())]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_steps_after_loading_are_those_without(name: str, seed: int, tmp_path: Path) -> None:
    """Two steps, then two more: of the one that saved, and of one with another split and other weights that loaded."""
    kind, options = OPTIMIZERS[name]
    data = batches(KINDS["perceptron"], seed, 4, 4)
    with _pipe(2, seed) as pipe, _pipe(3, seed + 1) as other:
        optimizer = pipe.optimizer(kind, **options)
        fresh = other.optimizer(kind, **options)
        fresh.param_groups[0]["lr"] = fresh.param_groups[0]["lr"] * 2
        _steps(pipe, optimizer, data[:2])
        _steps(other, fresh, data[:1])
        pipe.save(tmp_path)
        other.load(tmp_path)
        want, got = _steps(pipe, optimizer, data[2:]), _steps(other, fresh, data[2:])
        assert all(map(torch.equal, got, want))
        assert _groups(fresh) == _groups(optimizer)


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]


def _grouped(pipe: pk.Pipeline, *, swapped: bool = False, three: bool = False) -> torch.optim.Optimizer:
    """Weights with decay, biases without."""
    optimizer = pipe.optimizer(torch.optim.AdamW, lr=0.01)
    named = dict(pipe.named_parameters())
    weights = [p for name, p in named.items() if name.endswith("weight")]
    biases = [p for name, p in named.items() if name.endswith("bias")]
    optimizer.param_groups[0]["params"] = biases if swapped else weights
    optimizer.add_param_group({"params": weights if swapped else biases, "weight_decay": 0.0, "lr": 0.5})
    if three:
        optimizer.add_param_group({"params": []})
    return optimizer


def test_groups_go_by_names(seed: int, tmp_path: Path) -> None:
    """Each group's numbers come back with it; parameters that have changed groups are named."""
    with _pipe(2, seed) as pipe, _pipe(4, seed) as other:
        _grouped(pipe)
        pipe.save(tmp_path)
        optimizer = _grouped(other)
        for group in optimizer.param_groups:
            group.update(lr=7.0, weight_decay=7.0)
        other.load(tmp_path)
        assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.01, 0.01), (0.5, 0.0)]
        _grouped(other, swapped=True)
        with pytest.raises(pk.CheckpointError) as refusal:
            other.load(tmp_path)
        for name in dict(other.named_parameters()):
            groups = (0, 1) if name.endswith("weight") else (1, 0)
            assert "{} is in group {} of the optimizer in the checkpoint, in group {} here".format(
                name, *groups
            ) in str(refusal.value)
        del _grouped(other).param_groups[1]["params"][0]
        with pytest.raises(pk.CheckpointError, match=r"0\.bias is in group 1 of .*, in no group here"):
            other.load(tmp_path)
        _grouped(other, three=True)
        with pytest.raises(pk.CheckpointError, match="2 groups in the checkpoint, 3 here"):
            other.load(tmp_path)


def test_state_that_is_neither_tensor_nor_number_is_named(seed: int, tmp_path: Path) -> None:
    with _pipe(1, seed) as pipe:
        optimizer = pipe.optimizer(torch.optim.LBFGS)
        optimizer.state[next(iter(pipe.parameters()))]["old_dirs"] = [torch.zeros(2)]
        with pytest.raises(pk.CheckpointError) as refusal:
            pipe.save(tmp_path)
        assert "values['optimizer']['state']['0.weight']['old_dirs'][0] is a Tensor" in str(refusal.value)


def test_foreign_parameters_are_refused(seed: int, tmp_path: Path) -> None:
    with _pipe(1, seed) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 77))]})
        with pytest.raises(pk.CheckpointError, match=r"\(3, 77\)"):
            pipe.save(tmp_path)


def test_moments_in_bf16_and_of_frozen_parameters(seed: int, tmp_path: Path) -> None:
    """The dtypes of state are kept, whatever the parameter's; what has no state gets none."""
    with _pipe(2, seed) as pipe, _pipe(3, seed) as other:
        optimizer, fresh = pipe.optimizer(torch.optim.AdamW), other.optimizer(torch.optim.AdamW)
        first, second = list(pipe.parameters())[:2]
        optimizer.state[first] = {"exp_avg": torch.randn(7, 5).bfloat16(), "step": 4, "on": True, "no": None}
        pipe.save(tmp_path)
        other.load(tmp_path)
        mine, *rest = list(other.parameters())
        assert fresh.state[mine]["exp_avg"].equal(optimizer.state[first]["exp_avg"])
        assert fresh.state[mine]["exp_avg"].dtype == torch.bfloat16
        assert {k: v for k, v in fresh.state[mine].items() if k != "exp_avg"} == {"step": 4, "on": True, "no": None}
        assert all(p not in fresh.state for p in rest)
        assert second.shape == rest[0].shape
