"""Language models with random weights in float64, cut in every way there is, and the text of the unsplit model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pipekern as pk
from examples.gpt.model import GPT, Size
from tests.runtime.models import Gpt

VOCABULARY, DIM, LONGEST, DEPTH = 11, 8, 9, 6
LONG = torch.float64


class Positions(nn.Module):
    """Adds what belongs to each position; it keeps nothing, but must know where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(LONGEST, DIM, dtype=LONG))

    def forward(self, x: Tensor, cache: pk.Cache | None = None) -> Tensor:
        start = 0 if cache is None else cache.length
        return x + self.weight[start : start + x.shape[1]]


class Attention(nn.Module):
    """One causal head."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(DIM, 3 * DIM, dtype=LONG)

    def forward(self, x: Tensor, cache: pk.Cache | None = None) -> Tensor:
        q, k, v = self.project(x).chunk(3, dim=-1)
        if cache is not None:
            k, v = cache.append(k, v)
        new, known = q.shape[1], k.shape[1]
        later = torch.ones(new, known, dtype=torch.bool).triu(known - new + 1)
        return (q @ k.transpose(-1, -2)).masked_fill(later, -1e9).softmax(-1) @ v


class Block(nn.Module):
    """Knows nothing of caches, and has a layer inside that takes one; dropout must be off."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(DIM, dtype=LONG), Attention()
        self.mix = nn.Sequential(nn.Linear(DIM, DIM, dtype=LONG), nn.GELU(), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mix(x)


class Deep(nn.Module):
    """A layer list with something before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, DIM, dtype=LONG), Positions()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(DIM, VOCABULARY, dtype=LONG)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.positions(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _specs() -> list[pk.LayerSpec]:
    before = [pk.LayerSpec(nn.Embedding, VOCABULARY, DIM, dtype=LONG), pk.LayerSpec(Positions)]
    blocks = [pk.LayerSpec(Block) for _ in range(DEPTH)]
    return [*before, *blocks, pk.LayerSpec(nn.Linear, DIM, VOCABULARY, dtype=LONG)]


def _sequential() -> nn.Sequential:
    embed = nn.Sequential(nn.Embedding(VOCABULARY, DIM, dtype=LONG), Positions())
    blocks = [Block() for _ in range(DEPTH)]
    return nn.Sequential(embed, *blocks, nn.Identity(), nn.Linear(DIM, VOCABULARY, dtype=LONG))


def _example() -> GPT:
    return GPT(Size(vocabulary=VOCABULARY, width=DIM, depth=DEPTH, heads=2, length=LONGEST)).double()


MODELS: dict[str, Callable[[], Any]] = {
    "sequential": _sequential,
    "layer list": Deep,
    "specs": _specs,
    "example": _example,
    "no cache": lambda: Gpt(tied=False).double(),
    "no cache, tied": lambda: Gpt(tied=True).double(),
}


def build(kind: str, seed: int) -> Any:
    """The same model wherever it is made; weights large enough that texts are not all alike."""
    torch.manual_seed(seed)
    model = MODELS[kind]()
    if isinstance(model, nn.Module):
        with torch.no_grad():
            for parameter in {id(p): p for p in model.parameters()}.values():
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def unsplit(kind: str, seed: int) -> nn.Module:
    """The model that a pipeline of ``build(kind, seed)`` with this ``seed`` is cut from, in evaluation mode."""
    model = build(kind, seed)
    if not isinstance(model, nn.Module):
        model = nn.Sequential(*(spec.build(index, seed) for index, spec in enumerate(model)))
    return model.eval()


def prompts(seed: int, lengths: Sequence[int]) -> list[Tensor]:
    """Random prompts; token 0 is left out, which one of the models masks."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def greedy(model: nn.Module, prompt: Tensor, new: int, end: int | None = None) -> Tensor:
    """One prompt alone, all its tokens run again for each new one."""
    for _ in range(new):
        token = model(prompt[None])[0, -1].argmax()
        prompt = torch.cat([prompt, token[None]])
        if token == end:
            break
    return prompt


def counting(layers: int = 4) -> nn.Sequential:
    """After token t comes t + 1, of ten tokens: rows of the identity, moved by one."""
    embed, head = nn.Embedding(10, 10), nn.Linear(10, 10, bias=False)
    with torch.no_grad():
        embed.weight.copy_(torch.eye(10))
        head.weight.copy_(torch.eye(10).roll(1, 0))
    return nn.Sequential(embed, *(nn.Identity() for _ in range(layers - 2)), head)
