"""A model that breaks where its input says, forward or backward, and batches that say so."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MICROBATCHES, WIDTH = 4, 3
FORWARD, BACKWARD = 100, 200  # marks: at layer i, in the forward or the backward


class Layer(nn.Module):
    """Breaks where the first column of its input says so; else a product. The column goes along."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.inner = index, nn.Linear(WIDTH, WIDTH)

    def forward(self, value: Tensor) -> Tensor:
        mark, h = value[:, :1], self.inner(value[:, 1:].tanh())
        h = h.masked_fill(mark == FORWARD + self.index, math.inf)
        root = (h * (mark != BACKWARD + self.index)).square().sum(1, keepdim=True).sqrt()
        return torch.cat([mark, h + root * 0], 1)  # the slope of a root at 0 is infinite


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output[:, 1:], target)


def net(layers: int) -> nn.Sequential:
    return nn.Sequential(*(Layer(i) for i in range(layers)))


class Case(NamedTuple):
    """What goes wrong, and what must be said of it; ``where`` is a stage, or a layer that is a stage."""

    kind: str
    where: int
    microbatch: int

    def batch(self) -> tuple[Tensor, Tensor]:
        """Two samples a micro-batch; a mark or a NaN in the second of the one that is meant."""
        x, y = torch.randn(2 * MICROBATCHES, 1 + WIDTH), torch.randn(2 * MICROBATCHES, WIDTH)
        x[:, 0], sample = -1, 2 * self.microbatch + 1
        if self.kind in ("forward", "backward"):
            x[sample, 0] = self.where + (FORWARD if self.kind == "forward" else BACKWARD)
        elif self.kind in ("x", "y"):
            {"x": x, "y": y}[self.kind][sample, 1] = math.nan
        return x.double(), y.double()

    def text(self, home: list[int]) -> str:
        stages = len(home)
        at = f"first at micro-batch {self.microbatch}: "
        place = f"stage {self.where} (rank {home[self.where]})"
        made = f"the {'loss' if self.where == stages - 1 else 'output'} of {place} is not finite"
        reason = {"x": ", for x is not", "y": ", for y is not", "weight": f", for the parameter {self.where}"}
        if self.kind != "backward":
            return at + made + reason.get(self.kind, "")
        return f"at {place} is not finite, all forwards are"
