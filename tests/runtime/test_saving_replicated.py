"""Checkpoints over meshes: saved at any (pp, dp, zero), loaded at any other, bit for bit."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import pipekern as pk
from tests.launch import launch, values


class Layout(NamedTuple):
    pp: int
    dp: int
    zero: int
    schedule: str = "1f1b"


MICROBATCHES = 4  # over all replicas
LAYOUTS = [Layout(pp, dp, zero) for pp, dp, zero in product((1, 2), (1, 2), (0, 1, 2, 3)) if dp > 1 or zero in (0, 3)]


def model() -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Sequential(nn.Linear(7, 7), nn.Dropout(0.2), nn.GELU()) for _ in range(4)]
    return nn.Sequential(*layers, nn.BatchNorm1d(7, affine=False), nn.Linear(7, 3))


def run(layout: Layout, folder: str, first: int, steps: int, precision: str | None, fused: bool) -> dict[str, Any]:
    """Train ``steps`` from step ``first`` on, from the checkpoint in ``folder`` if there is one, and save."""
    pipe = pk.Pipeline(
        model(), loss_fn=nn.CrossEntropyLoss(), microbatches=MICROBATCHES // layout.dp, schedule=layout.schedule,
        mesh={"pp": layout.pp, "dp": layout.dp}, zero=layout.zero, precision=precision, timeout=30.0,
    )  # fmt: skip
    with pipe:
        cls = pk.optim.AdamW if fused else torch.optim.AdamW
        optimizer = pipe.optimizer(cls, lr=1e-2, **({"max_norm": 0.5} if fused else {}))
        if first:
            assert pipe.load(folder) == {"next": first}
        losses = []
        for step in range(first, first + steps):
            data = torch.Generator().manual_seed(step)
            x, y = torch.randn(16, 7, generator=data), torch.randint(3, (16,), generator=data)
            replica = pipe._parts.place.dp
            losses.append(float(pipe.train_step(x.chunk(layout.dp)[replica], y.chunk(layout.dp)[replica])))
            optimizer.step()
            optimizer.zero_grad()
        pipe.save(folder, {"next": first + steps})
        return {"losses": losses, "state": {name: t.clone() for name, t in pipe.state_dict().items()}}


def trained(layout: Layout, *args: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    rows = values(launch(run, layout.pp * layout.dp, layout, *args))
    state = {name: value for row in rows for name, value in row["state"].items()}
    for row in rows:
        assert row["losses"] == rows[0]["losses"]
        for name, value in row["state"].items():
            assert torch.equal(value, state[name]) or "running" in name, name  # replicas have statistics of their own
    return rows[0]["losses"], state


@pytest.mark.parametrize(
    "pair", [(Layout(2, 2, 1), Layout(2, 1, 0)), (Layout(1, 2, 3), Layout(2, 2, 2, "zb-h1"))], ids=str
)
def test_what_is_loaded_was_saved(pair: tuple[Layout, Layout], tmp_path: Path) -> None:
    check(*pair, tmp_path, "bf16", fused=True)


@pytest.mark.full
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("before", LAYOUTS, ids=str)
@pytest.mark.parametrize("after", LAYOUTS, ids=str)
def test_all_pairs(before: Layout, after: Layout, fused: bool, tmp_path: Path) -> None:
    check(before, after, tmp_path, "bf16" if fused else None, fused)


def check(before: Layout, after: Layout, folder: Path, precision: str | None, fused: bool) -> None:
    """A step of no length after loading leaves the same bits, and saves the same."""
    _, state = trained(before, str(folder), 0, 2, precision, fused)
    saved = contents(folder)
    _, again = trained(after, str(folder), 2, 0, precision, fused)
    for name, value in again.items():
        assert torch.equal(value, state[name]) or "running" in name, name
    assert contents(folder).keys() == saved.keys()
    for key, value in contents(folder).items():
        assert key.startswith("random/") or torch.equal(value, saved[key]), key


def contents(folder: Path) -> dict[str, torch.Tensor]:
    from pipekern.checkpoint.load import Checkpoint

    checkpoint = Checkpoint(folder)
    keys = [key for key in checkpoint.entries if not key.startswith("random/")]
    return {key: checkpoint.tensor(key) for key in keys}


@pytest.mark.parametrize("layout", [Layout(2, 2, 1), Layout(2, 2, 3)], ids=str)
def test_a_run_that_is_resumed_is_the_run(layout: Layout, tmp_path: Path) -> None:
    """Dropout, moments and all, bit for bit."""
    whole, state = trained(layout, str(tmp_path / "whole"), 0, 4, "bf16", True)
    first, _ = trained(layout, str(tmp_path / "parts"), 0, 2, "bf16", True)
    second, resumed = trained(layout, str(tmp_path / "parts"), 2, 2, "bf16", True)
    assert first + second == whole
    for name, value in resumed.items():
        assert torch.equal(value, state[name]) or "running" in name, name
