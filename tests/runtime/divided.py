"""Models whose modules are divided among tensor-parallel parts, with their plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
)
from torch.nn import functional as F

from tests.runtime.models import Batch

WORDS, WIDTH, HEADS, TIME = 13, 8, 4, 6


class Mlp(nn.Module):
    """A perceptron with a residual; both layers have biases."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.inner, self.outer = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.outer(self.down(self.inner(F.gelu(self.up(self.norm(h))))))


class Attention(nn.Module):
    """Heads as many as the projections give; each is normalised by weights that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH // HEADS)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        normal = self.norm(h)
        q, k, v = (
            layer(normal).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(self.head_norm(q), self.head_norm(k), v, is_causal=True)
        return h + self.out(mixed.transpose(1, 2).flatten(2))


class Text(nn.Module):
    """Embedding, blocks, norm and head; with ``tied``, embedding and head are one weight."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(layer() for _ in range(2) for layer in (Attention, Mlp))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        h = self.embed(words)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def perceptrons(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(*(Mlp(dropout) for _ in range(4)))


def layers() -> nn.Module:
    """Two perceptrons, every layer of which may be a stage: some messages are in parts."""
    both = (
        layer
        for _ in range(2)
        for layer in (nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
    )
    return nn.Sequential(*both)


def tied_text() -> nn.Module:
    return Text(tied=True)


_DECODER = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def llama() -> nn.Module:
    """A vocabulary that two parts do not divide."""
    import transformers  # 3 s, which others of these models need not wait for

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER))


def tied_llama() -> nn.Module:
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER, tie_word_embeddings=True))


def qwen3() -> nn.Module:
    """Norms of queries and keys, whose weights all heads share."""
    import transformers

    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_DECODER, head_dim=4))


def vectors(samples: int) -> Batch:
    shape = (samples, TIME, WIDTH)
    return Batch(torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64))


def words(samples: int) -> Batch:
    shape = (samples, TIME)
    return Batch(torch.randint(WORDS, shape), torch.randint(WORDS, shape))


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def logits_loss(output: Any, target: Tensor) -> Tensor:
    return token_loss(output.logits, target)


_ATTENTION: dict[str, ParallelStyle] = {
    "blocks.*.[qkv]": ColwiseParallel(),
    "blocks.*.out": RowwiseParallel(),
}
_MLP: dict[str, ParallelStyle] = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
_ENDS: dict[str, ParallelStyle] = {
    "embed": RowwiseParallel(input_layouts=Replicate()),
    "head": ColwiseParallel(output_layouts=Replicate()),
}


_SEQUENCE: dict[str, ParallelStyle] = {
    "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "blocks.*.norm": SequenceParallel(),
    "blocks.*.[qkv]": ColwiseParallel(input_layouts=Shard(1)),
    "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
    "blocks.*.out": RowwiseParallel(output_layouts=Shard(1)),
    "blocks.*.down": RowwiseParallel(output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


class Kind(NamedTuple):
    """A model, its plan, its loss and its batches."""

    build: Callable[[], nn.Module]
    plan: dict[str, ParallelStyle] | str
    loss_fn: Callable[[Any, Any], Tensor]
    batch: Callable[[int], Batch]


KINDS = {
    "perceptrons": Kind(perceptrons, {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}, F.mse_loss, vectors),
    "layers": Kind(layers, {"[15]": ColwiseParallel(), "[37]": RowwiseParallel()}, F.mse_loss, vectors),
    "attention": Kind(Text, _ATTENTION | _MLP, token_loss, words),
    "ends": Kind(Text, _ATTENTION | _MLP | _ENDS, token_loss, words),
    "sequence": Kind(Text, _SEQUENCE, token_loss, words),
    "tied": Kind(tied_text, _ATTENTION | _ENDS, token_loss, words),
    "llama": Kind(llama, "auto", logits_loss, words),
    "tied llama": Kind(tied_llama, "auto", logits_loss, words),
    "qwen3": Kind(qwen3, "auto", logits_loss, words),
}
