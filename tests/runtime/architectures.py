"""Well-known architectures, small and with random weights, written in plain torch; each with its batches and loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.runtime.models import Batch, Kind, token_loss

VOCABULARY, DIM, HEADS, TIME = 29, 16, 2, 10


class Gpt2Block(nn.Module):
    """Pre-norm block with one product for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attend, self.project = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(approximate="tanh"), nn.Linear(4 * DIM, DIM))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.attend(self.ln_1(h)).chunk(3, dim=-1))
        h = h + self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return h + self.mlp(self.ln_2(h))


class Gpt2(nn.Module):
    """Positions learned, head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, DIM), nn.Embedding(TIME, DIM)
        self.h = nn.ModuleList(Gpt2Block() for _ in range(4))
        self.ln_f, self.lm_head = nn.LayerNorm(DIM), nn.Linear(DIM, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Bert(nn.Module):
    """Encoder with a padding mask for all layers; masked positions are scored alone."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(VOCABULARY, DIM, padding_idx=0), nn.Embedding(2, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.layer = nn.ModuleList(
            nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, 0.0, F.gelu, batch_first=True) for _ in range(4)
        )
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens: Tensor, kinds: Tensor) -> Tensor:
        padded = tokens == 0
        x = self.norm(self.words(tokens) + self.kinds(kinds))
        for layer in self.layer:
            x = layer(x, src_key_padding_mask=padded)
        return self.head(x)


def masked_loss(logits: Tensor, targets: Tensor) -> Any:
    """(sum, count) of the positions that count; some micro-batches have none."""
    flat = targets.flatten()
    return F.cross_entropy(logits.flatten(0, 1), flat, ignore_index=-1, reduction="sum"), (flat >= 0).sum()


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class LlamaBlock(nn.Module):
    """Rotary positions handed in, fewer key than query heads, gated feed-forward or ``experts`` of them."""

    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.before, self.after = RmsNorm(), RmsNorm()
        self.q, self.kv = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.o = nn.Linear(DIM, DIM, bias=False)
        self.mlp = Experts(experts) if experts else Gated()

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        h = self.before(x)
        k, v = self.kv(h).chunk(2, dim=-1)
        q, k, v = rotated(heads(self.q(h)), turn), rotated(heads(k, 1), turn), heads(v, 1)
        mixed = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.after(x))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(DIM, 2 * DIM, bias=False), nn.Linear(DIM, 2 * DIM, bias=False)
        self.down = nn.Linear(2 * DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """The two best of several feed-forwards a token; in a micro-batch some get no token at all."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, count, bias=False)
        self.experts = nn.ModuleList(Gated() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        share, chosen = self.router(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                out = out.index_add(0, token, share[token, place, None] * expert(flat[token]))
        return out.view_as(x)


class Llama(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(LlamaBlock(experts) for _ in range(4))
        self.norm, self.head = RmsNorm(), nn.Linear(DIM, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        size = DIM // HEADS
        rates = 100.0 ** (-torch.arange(0, size, 2, device=x.device, dtype=x.dtype) / size)
        angles = torch.arange(tokens.shape[1], device=x.device, dtype=x.dtype)[:, None] * rates.repeat(2)
        turn = angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, turn)
        return self.head(self.norm(x))


class Encode(nn.Module):
    """One encoder layer of a pair (source, target): the target passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, 0.0, batch_first=True)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.layer(pair[0]), pair[1]


class Decode(nn.Module):
    """One decoder layer: the memory passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(DIM, HEADS, 2 * DIM, 0.0, batch_first=True)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0], self.layer(pair[1], pair[0])


class EmbedBoth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, DIM)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.words(pair[0]), self.words(pair[1])


class Second(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[1]


def t5() -> nn.Sequential:
    """Encoder and decoder in one row, the embedding used for both, the head tied to it."""
    embed, head = EmbedBoth(), nn.Linear(DIM, VOCABULARY, bias=False)
    head.weight = embed.words.weight
    return nn.Sequential(embed, Encode(), Encode(), Decode(), Decode(), Second(), head)


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and width == out
        self.down = nn.Identity() if same else nn.Sequential(nn.Conv2d(width, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.two(self.relu(self.bn1(self.one(x))))) + self.down(x))


def resnet18() -> nn.Sequential:
    """Two blocks a width, as ResNet-18 has, a sixteenth as wide."""
    widths = [(4, 4, 1), (4, 4, 1), (4, 8, 2), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1)]
    stem = [nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    return nn.Sequential(
        *stem, *(Residual(*w) for w in widths), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    )


def vgg11() -> nn.Sequential:
    """VGG-11's plan, a sixteenth as wide, on images of 32 × 32."""
    layers: list[nn.Module] = []
    width = 3
    for plan in (4, "pool", 8, "pool", 16, 16, "pool", 32, 32, "pool", 32, 32, "pool"):
        if isinstance(plan, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(width, plan, 3, padding=1), nn.ReLU(inplace=True)]
            width = plan
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 16), nn.ReLU(inplace=True), nn.Linear(16, 5))


class Vit(nn.Module):
    """Patches, a class token, and the head on it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, 8, 8)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, DIM)), nn.Parameter(torch.randn(1, 17, DIM) / 4)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, 0.0, batch_first=True, norm_first=True) for _ in range(4)
        )
        self.head = nn.Linear(DIM, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Recommender(nn.Module):
    """Large tables of sums of rows, their products with each other, and a perceptron over them and the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.EmbeddingBag(500, 8, mode="sum") for name in ("user", "item", "tags")})
        self.bottom = nn.Linear(4, 8)
        self.top = nn.ModuleList(nn.Sequential(nn.Linear(width, 16), nn.ReLU()) for width in (14, 16, 16))
        self.score = nn.Linear(16, 1)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        found = [table(ids[:, i]) for i, table in enumerate(self.tables.values())]
        rows = torch.stack([*found, self.bottom(numbers)], 1)
        products = torch.bmm(rows, rows.transpose(1, 2))
        x = torch.cat([rows[:, 3], products[:, [0, 0, 0, 1, 1, 2], [1, 2, 3, 2, 3, 3]]], 1)
        for layer in self.top:
            x = layer(x)
        return self.score(x).squeeze(1)


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    one, other = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-other, one], -1) * sin


def text(samples: int) -> Batch:
    return Batch(torch.randint(VOCABULARY, (samples, TIME)), torch.randint(VOCABULARY, (samples, TIME)))


def masked_text(samples: int) -> Batch:
    words = torch.randint(VOCABULARY, (samples, TIME))
    targets = torch.where(torch.rand(samples, TIME) < 0.15, words, -1)
    targets[0] = words[0]  # something counts
    return Batch((words.clamp(min=1), torch.randint(2, (samples, TIME))), targets)


def pairs(samples: int) -> Batch:
    x = torch.randint(VOCABULARY, (samples, TIME)), torch.randint(VOCABULARY, (samples, TIME - 3))
    return Batch(x, torch.randint(VOCABULARY, (samples, TIME - 3)))


def images(samples: int) -> Batch:
    return Batch(torch.randn(samples, 3, 32, 32, dtype=torch.float64), torch.randint(5, (samples,)))


def visits(samples: int) -> Batch:
    x = torch.randint(500, (samples, 3, 6)), torch.randn(samples, 4, dtype=torch.float64)
    return Batch(x, torch.randint(2, (samples,)).double())


ARCHITECTURES: dict[str, Kind] = {
    "gpt-2": Kind(Gpt2, token_loss, text),
    "bert": Kind(Bert, masked_loss, masked_text),
    "llama": Kind(Llama, token_loss, text),
    "mixtral": Kind(lambda: Llama(experts=4), token_loss, text),
    "t5": Kind(t5, token_loss, pairs),
    "resnet-18": Kind(resnet18, F.cross_entropy, images, coupled=True),
    "vgg-11": Kind(vgg11, F.cross_entropy, images),
    "vit": Kind(Vit, F.cross_entropy, images),
    "recommender": Kind(Recommender, F.binary_cross_entropy_with_logits, visits),
}
