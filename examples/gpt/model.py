"""A small GPT: embedding, layers of attention and feed-forward, norm, head. Plain PyTorch.

All that it knows of pipekern is the cache that a layer is given while text is generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    import pipekern as pk


@dataclass(frozen=True)
class Size:
    """``length`` is the most tokens that the model sees at once."""

    vocabulary: int = 4096
    width: int = 128
    depth: int = 4
    heads: int = 4
    length: int = 128


class Layer(nn.Module):
    """Causal self-attention with rotary positions, then a feed-forward with squared ReLU; both add to their input."""

    cosine: torch.Tensor
    sine: torch.Tensor

    def __init__(self, size: Size):
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.feed_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.mix.weight)  # a layer starts as the identity: the loss falls faster
        nn.init.zeros_(self.down.weight)
        half = width // size.heads // 2
        angles = torch.arange(size.length)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, x: torch.Tensor, cache: pk.Cache | None = None) -> torch.Tensor:
        """(samples, tokens, width) to the same."""
        x = x + self.attend(self.attention_norm(x), cache)
        return x + self.down(F.relu(self.up(self.feed_norm(x))).square())

    def attend(self, x: torch.Tensor, cache: pk.Cache | None) -> torch.Tensor:
        """What every token takes from those before it; with a cache ``x`` is a whole prompt, then one token a call."""
        samples, tokens, width = x.shape
        split = self.qkv(x).view(samples, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        start = 0 if cache is None else cache.length
        query, key = self.rotate(query, start), self.rotate(key, start)
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=start == 0)
        return self.mix(mixed.transpose(1, 2).reshape(samples, tokens, width))

    def rotate(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """Turn pairs of entries by an angle that grows with the position (RoPE, arXiv 2104.09864), from ``start``."""
        end = start + x.shape[-2]
        cosine, sine = self.cosine[start:end], self.sine[start:end]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cosine - b * sine, a * sine + b * cosine), dim=-1).to(x.dtype)


class GPT(nn.Module):
    """Tokens (samples, tokens), int64, to logits (samples, tokens, vocabulary)."""

    def __init__(self, size: Size):
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.depth))
        self.norm = nn.RMSNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def loss_fn(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats a token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
