"""The models and batches that the tests of the runtime train, in float64 so that 1e-12 means something."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk

VOCABULARY, DIM = 11, 8


class Batch(NamedTuple):
    """Inputs and targets, samples first."""

    x: Any
    y: Any


class Kind(NamedTuple):
    """A model to build from a seed, its loss, and its batches: ``batch(samples)``.

    ``coupled``: the samples of a micro-batch see each other, so that micro-batches are part of what is computed.
    """

    build: Callable[[], Any]
    loss_fn: Callable[[Any, Any], Tensor]
    batch: Callable[[int], Batch]
    coupled: bool = False


class Block(nn.Module):
    """One attention head and a perceptron over ``(batch, time, DIM)``; ``keep``: positions that may be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attend = nn.Linear(DIM, 3 * DIM, bias=False)
        self.mix = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.attend(self.norm(h)).chunk(3, dim=-1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~keep, -1e9)
        h = h + scores.softmax(-1) @ v
        return h + self.mix(h)


class Gpt(nn.Module):
    """Embedding and positions, six blocks, final norm and head: eight units.

    The mask and the skip connection are computed before the blocks and used in all of them and after them.
    """

    def __init__(self, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.position = nn.Parameter(torch.randn(9, DIM) / 4)
        self.causal: Tensor
        self.register_buffer("causal", torch.ones(9, 9, dtype=torch.bool).tril())
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        embedded = self.embed(tokens)
        keep = self.causal[:time, :time] & (tokens != 0)[:, None, :]
        h = embedded + self.position[:time]
        for block in self.blocks:
            h = block(h, keep)
        return self.head(self.norm(h + embedded))


def perceptron() -> nn.Sequential:
    """Ten units."""
    widths = [5, 7, 8, 6, 9, 4]
    layers = [(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(widths)]
    return nn.Sequential(*(layer for pair in layers for layer in pair))


def normalised() -> nn.Sequential:
    """Nine units; BatchNorm couples the samples of a micro-batch. A bias before it would have no gradient but noise."""
    return nn.Sequential(
        nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(),
        nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(),
        nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4),
    )  # fmt: skip


def lazy() -> list[pk.LayerSpec]:
    """Ten units as specs."""
    widths = [5, 8, 7, 6, 8, 4]
    pairs = pairwise(widths)
    layers = [(pk.LayerSpec(nn.Linear, a, b, dtype=torch.float64), pk.LayerSpec(nn.Tanh)) for a, b in pairs]
    return [layer for pair in layers for layer in pair]


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all tokens; every sample has as many."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def vectors(samples: int) -> Batch:
    return Batch(torch.randn(samples, 5, dtype=torch.float64), torch.randn(samples, 4, dtype=torch.float64))


def tokens(samples: int) -> Batch:
    """Sequences of a length drawn anew for each batch."""
    shape = (samples, int(torch.randint(3, 10, ())))
    return Batch(torch.randint(0, VOCABULARY, shape), torch.randint(0, VOCABULARY, shape))


KINDS: dict[str, Kind] = {
    "perceptron": Kind(perceptron, F.mse_loss, vectors),
    "batchnorm": Kind(normalised, F.mse_loss, vectors, coupled=True),
    "gpt": Kind(lambda: Gpt(tied=False), token_loss, tokens),
    "tied gpt": Kind(lambda: Gpt(tied=True), token_loss, tokens),
    "lazy": Kind(lazy, F.mse_loss, vectors),
}


def build(kind: str, seed: int) -> Any:
    """See :func:`make`."""
    return make(KINDS[kind], seed)


def make(kind: Kind, seed: int) -> Any:
    """The same module, in float64, on every rank and in every run with this seed; specs as they are."""
    torch.manual_seed(seed)
    model = kind.build()
    return model.double() if isinstance(model, nn.Module) else model


def batches(kind: Kind, seed: int, samples: int, count: int) -> list[Batch]:
    """``count`` batches of random size from ``samples`` to ``samples + 3``, the same wherever the seed is."""
    torch.manual_seed(seed + 1)
    return [kind.batch(samples + int(torch.randint(0, 4, ()))) for _ in range(count)]
