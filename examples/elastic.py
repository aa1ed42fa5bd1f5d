"""Trains on the machines that are there: when one dies or joins, all start again from the last save, on as many ranks.

On every machine, HOST being one that stays, and the folder one that all of them see:

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nnodes=1:8 --nproc-per-node=1 --max-restarts=20 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 \\
        -m examples.elastic --folder FOLDER

The variable gives every start a store of its own. Without it, torch 2.13 lets no machine join, nor the first one leave.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pipekern as pk

BATCH = 32


def model() -> nn.Sequential:
    """The same weights on every rank."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1)) for _ in range(4)]
    return nn.Sequential(nn.Linear(8, 64), *blocks, nn.Linear(64, 1))


def dataset() -> TensorDataset:
    """Points, and their distance from the origin."""
    points = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(points, points.norm(dim=1, keepdim=True))


def batches(data: TensorDataset, epoch: int, first: int) -> DataLoader[tuple[Tensor, ...]]:
    """Those of an epoch from number ``first`` on. Their order follows from the epoch alone."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch))
    return DataLoader(data, BATCH, sampler=order[first * BATCH :].tolist())


def train(folder: Path, epochs: int, every: int) -> Iterator[tuple[int, float]]:
    """Steps and losses, from the last save on, with a save after ``every`` steps."""
    data, step = dataset(), 0
    steps = len(data) // BATCH  # of an epoch
    with pk.Pipeline(model(), loss_fn=nn.MSELoss(), microbatches=8) as pipe:
        optimizer = pipe.optimizer(torch.optim.AdamW, lr=1e-3)
        if (folder / "manifest.json").exists():
            step = pipe.load(folder)
        while step < epochs * steps:
            for x, y in batches(data, step // steps, step % steps):
                loss = pipe.train_step(x, y)
                optimizer.step()
                optimizer.zero_grad()
                yield step, float(loss)
                step += 1
                if step % every == 0:
                    pipe.save(folder, step)


def main() -> None:
    """Print the loss of every tenth step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("checkpoint"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--every", type=int, default=20, help="steps from one save to the next")
    chosen = parser.parse_args()
    for step, loss in train(chosen.folder, chosen.epochs, chosen.every):
        if step % 10 == 0 and os.environ.get("RANK", "0") == "0":
            print(f"step {step} on {os.environ.get('WORLD_SIZE', 'one process')} ranks: loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
