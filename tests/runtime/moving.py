"""A run that moves its layers from rank to rank while it trains, beside one that never does."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.runtime.models import VOCABULARY, Gpt, token_loss
from tests.runtime.step import chunks, union

RUNNABLE = [name for name in pk.schedule.names() if pk.schedule.describe(name).runnable]

Splits = Mapping[int, Sequence[int]]  # by the step before which it is asked for


class Into(nn.Module):
    """(samples, 5) to (samples, 8) by a weight that another layer has too."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Back(Into):
    """(samples, 8) to (samples, 5) by the same weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def everything() -> nn.Sequential:
    """Fourteen units: a tied weight, dropout, running statistics, units without parameters, a frozen one."""
    weight = nn.Parameter(torch.randn(5, 8) / 3)
    blocks = [
        layer
        for _ in range(3)
        for layer in (nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.GELU())
    ]
    blocks[4].requires_grad_(False)
    return nn.Sequential(Into(weight), *blocks, Back(weight))


class Case(NamedTuple):
    """What is trained, and how; ``units`` of the model can be moved."""

    kind: str
    ranks: int
    schedule: str
    steps: int
    options: Mapping[str, Any] = {}
    fused: bool = False

    @property
    def units(self) -> int:
        return 14 if self.kind == "everything" else 8

    @property
    def clips(self) -> bool:
        """Not in shards: another split cuts them otherwise, and a norm is summed in another order."""
        return not self.options.get("zero")

    @property
    def microbatches(self) -> int:
        """So many that every schedule takes them."""
        return 2 * self.ranks

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return everything() if self.kind == "everything" else Gpt(tied=True)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.kind == "everything":
            x, y = torch.randn(2, 8 * self.ranks, 5, generator=generator)
        else:
            x, y = torch.randint(0, VOCABULARY, (2, 8 * self.ranks, 6), generator=generator)
        return x, y

    def pipeline(self, seed: int, **others: Any) -> tuple[pk.Pipeline, torch.optim.Optimizer]:
        loss_fn = F.mse_loss if self.kind == "everything" else token_loss
        options = {"ranks": self.ranks, "schedule": self.schedule, "microbatches": self.microbatches, "timeout": 30.0}
        pipe = pk.Pipeline(self.model(seed), loss_fn=loss_fn, **{**options, **self.options, **others})
        if self.fused:
            return pipe, pipe.optimizer(pk.optim.AdamW, lr=1e-2, max_norm=1.0 if self.clips else None)
        return pipe, pipe.optimizer(torch.optim.AdamW, lr=1e-2)

    def splits(self, seed: int, moves: int) -> dict[int, list[int]]:
        """Random ones before ``moves`` random steps."""
        generator = random.Random(seed)
        stages = self.ranks * chunks(self.schedule)
        return {step: cuts(self.units, stages, generator) for step in generator.sample(range(self.steps), moves)}


def cuts(units: int, stages: int, generator: random.Random) -> list[int]:
    """Units a stage, all splits alike likely."""
    bounds = [0, *sorted(generator.sample(range(1, units), stages - 1)), units]
    return [end - start for start, end in pairwise(bounds)]


class Trained(NamedTuple):
    """What a run leaves, on a process or on all together."""

    losses: list[Tensor]
    norms: list[Tensor]
    state: dict[str, Tensor]
    moments: dict[str, Any]
    order: list[str]  # names of the state, as they come


def train(case: Case, seed: int, splits: Splits) -> Trained:
    """Every optimizer's step after two of gradients, and the layers moved before the steps of ``splits``."""
    pipe, optimizer = case.pipeline(seed)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    replica = int(os.environ.get("RANK", "0")) // case.ranks
    generator = torch.Generator().manual_seed(seed + replica)
    losses, norms = [], []
    with pipe:
        for step in range(case.steps):
            if step in splits:
                move(pipe, splits[step])
            losses.append(pipe.train_step(*case.batch(generator)))
            if step % 2:
                norms += [pipe.clip_grad_norm_(1.0)] if case.clips else []
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        state = {name: value.clone() for name, value in pipe.state_dict().items()}
        return Trained(losses, norms, state, moments(pipe, optimizer), list(state))


def move(pipe: pk.Pipeline, split: Sequence[int]) -> pk.Move:
    """To ``split``; what is said of it must be so."""
    before, random_state = pipe.split, torch.get_rng_state()
    made = pipe.replan(split=split)
    assert (made.before, made.after) == (before, tuple(split)) and pipe.split == tuple(split), made
    assert torch.equal(torch.get_rng_state(), random_state), "random numbers were drawn"
    return made


def moments(pipe: pk.Pipeline, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the optimizer keeps, by parameter and kind."""
    named = dict(pipe.named_parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in named.values()}, "the optimizer has other parameters than the pipeline"
    return {
        f"{name}/{key}": value.clone() if isinstance(value, Tensor) else value
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def whole(parts: Sequence[Trained]) -> Trained:
    """Of all processes together."""
    first = parts[0]
    assert all(same(part.losses, first.losses) and same(part.norms, first.norms) for part in parts), "losses differ"
    order = sorted({name for part in parts for name in part.order})
    return Trained(first.losses, first.norms, union([p.state for p in parts]), union([p.moments for p in parts]), order)


def same(a: Any, b: Any) -> bool:
    """The same bits."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def compare(moved: Trained, still: Trained) -> None:
    """Fail unless all bits are the same, with the names of what is not."""
    first = next((i for i, pair in enumerate(zip(moved.losses, still.losses, strict=True)) if not same(*pair)), None)
    assert first is None, f"the loss of step {first} differs"
    assert same(moved.norms, still.norms), "a norm of the gradients differs"
    for one, other in ((moved.state, still.state), (moved.moments, still.moments)):
        assert one.keys() == other.keys(), one.keys() ^ other.keys()
        assert [name for name in one if not same(one[name], other[name])] == []
