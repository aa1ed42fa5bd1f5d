"""Checkpoints of tensor-parallel parts: saved at any (pp, dp, tp, zero), loaded at any other, bit for bit."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel

import pipekern as pk
from pipekern.checkpoint.load import Checkpoint
from tests.launch import launch, values
from tests.runtime.parity import same_bits
from tests.runtime.step import union


class Place(NamedTuple):
    pp: int
    dp: int
    tp: int

    @property
    def processes(self) -> int:
        return self.pp * self.dp * self.tp


class Run(NamedTuple):
    """One pipeline: from the checkpoint in ``source``, if any, ``steps`` on, into ``target``."""

    zero: int
    source: str
    first: int
    steps: int
    target: str
    precision: str | None


def model() -> nn.Module:
    """Seven rows, of which two parts have four and three."""
    torch.manual_seed(3)
    layers = [nn.Sequential(nn.Linear(7, 7), nn.Dropout(0.2), nn.GELU(), nn.LayerNorm(7)) for _ in range(4)]
    return nn.Sequential(*layers, nn.Linear(7, 3))


PLAN = {"*.0": ColwiseParallel(output_layouts=Replicate())}


def _run(place: Place, run: Run) -> tuple[list[float], dict[str, Tensor]]:
    options: dict[str, Any] = {"mesh": place._asdict(), "tensor_parallel": PLAN, "zero": run.zero}
    options |= {"precision": run.precision, "microbatches": 4 // place.dp, "timeout": 30.0}
    with pk.Pipeline(model(), loss_fn=nn.CrossEntropyLoss(), **options) as pipe:
        fused = run.precision is not None
        cls = pk.optim.AdamW if fused else torch.optim.AdamW
        optimizer = pipe.optimizer(cls, lr=1e-2, **({"max_norm": 0.5} if fused else {}))
        if run.source:
            assert pipe.load(run.source) == {"next": run.first}
        losses = []
        for step in range(run.first, run.first + run.steps):
            data = torch.Generator().manual_seed(step)
            x, y = torch.randn(16, 7, generator=data), torch.randint(3, (16,), generator=data)
            replica = pipe._parts.place.dp
            losses.append(float(pipe.train_step(x.chunk(place.dp)[replica], y.chunk(place.dp)[replica])))
            optimizer.step()
            optimizer.zero_grad()
        pipe.save(run.target, {"next": run.first + run.steps})
        return losses, {name: value.clone() for name, value in pipe.state_dict().items()}


def _run_all(place: Place, runs: list[Run]) -> list[tuple[list[float], dict[str, Tensor]]]:
    return [_run(place, run) for run in runs]


def trained(place: Place, runs: list[Run]) -> list[tuple[list[float], dict[str, Tensor]]]:
    """Losses and the whole state after each of ``runs``."""
    found = []
    for rows in zip(*values(launch(_run_all, place.processes, place, runs, timeout=120.0)), strict=True):
        assert all(losses == rows[0][0] for losses, _ in rows)
        found.append((rows[0][0], union([state for _, state in rows])))
    return found


def contents(folder: str) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {key: checkpoint.tensor(key) for key in checkpoint.entries if not key.startswith("random/")}


def check(before: tuple[Place, int], after: list[tuple[Place, int]], folder: Path, precision: str | None) -> None:
    """What is saved at ``before`` is loaded at each of ``after``, where a step of no length saves the same."""
    place, zero = before
    saved = str(folder / "saved")
    ((_, state),) = trained(place, [Run(zero, "", 0, 2, saved, precision)])
    kept = contents(saved)
    assert {name for name, value in model().named_parameters()} <= {
        key.split("/")[1] for key in kept if "exp_avg" in key
    }
    for place in dict.fromkeys(place for place, _ in after):
        zeros = [zero for other, zero in after if other == place]
        targets = {zero: str(folder / f"{place} {zero}") for zero in zeros}
        runs = [Run(zero, saved, 2, 0, targets[zero], precision) for zero in zeros]
        for zero, (_, again) in zip(zeros, trained(place, runs), strict=True):
            assert same_bits(again, state), f"{before} to {place} zero={zero}"
            assert same_bits(contents(targets[zero]), kept), f"{before} to {place} zero={zero}: files"


PLACES = [Place(*sizes) for sizes in product((1, 2), repeat=3)]
LAYOUTS = [(place, zero) for place in PLACES for zero in (range(4) if place.dp > 1 else (0, 3))]


def test_what_is_loaded_was_saved(tmp_path: Path) -> None:
    both = Place(1, 2, 2)
    check((both, 1), [(both, 3), (Place(2, 1, 1), 0)], tmp_path / "shards", "bf16")
    check((Place(1, 2, 1), 2), [(Place(1, 1, 2), 0)], tmp_path / "whole", None)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("before", LAYOUTS, ids=str)
def test_all_pairs(before: tuple[Place, int], precision: str | None, tmp_path: Path) -> None:
    check(before, LAYOUTS, tmp_path, precision)


@pytest.mark.parametrize(("place", "zero"), [(Place(2, 1, 2), 0), (Place(1, 2, 2), 3)], ids=str)
def test_a_run_that_is_resumed_is_the_run(place: Place, zero: int, tmp_path: Path) -> None:
    """Dropout, moments and all, bit for bit."""
    whole, part = str(tmp_path / "whole"), str(tmp_path / "part")
    runs = [
        Run(zero, "", 0, 4, whole, "bf16"),
        Run(zero, "", 0, 2, part, "bf16"),
        Run(zero, part, 2, 2, part, "bf16"),
    ]
    (losses, state), (first, _), (second, resumed) = trained(place, runs)
    assert first + second == losses
    assert same_bits(resumed, state)
