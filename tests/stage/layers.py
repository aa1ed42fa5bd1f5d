"""Layers and their batches: what can put weight gradients off, and what cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


class Doubled(nn.Linear):
    """A subclass that does something around its parent's forward."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input.relu())


class Written(nn.Linear):
    """A subclass that writes its product out, with the weight by name."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, bias=self.bias) + F.linear(input, self.weight * 2)


class Adapted(nn.Module):
    """A low-rank adapter around a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Tied(nn.Module):
    """A look-up and a product with one weight, and a product used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.inner(self.words(x)).tanh()))


class Viewed(nn.Module):
    """Views before and after a product, and an expanded input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.reshape(-1, 2, 2).transpose(0, 1)[:, 1:])
        return y.expand(2, *y.shape).transpose(-1, 0).flatten(1)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.inner = reentrant, nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class OwnCheckpoint(nn.Linear):
    """A subclass that checkpoints its own product."""

    def forward(self, input: Tensor) -> Any:
        return checkpoint(super().forward, input, use_reentrant=False)


class Squared(nn.Linear):
    """A subclass with two products, one of them with its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.linear(input, input.new_ones(4, 4)), self.weight, self.bias)


class Inside(nn.Module):
    """Two layers, and what ``inside`` makes of the module and its input."""

    def __init__(self, inside: Callable[[Inside, Tensor], Tensor]) -> None:
        super().__init__()
        self.inside, self.a, self.b = inside, nn.Linear(4, 4), nn.Linear(4, 4)

    def product(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).tanh())
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(self, x)


def force(module: Inside, x: Tensor, create_graph: bool = False) -> Tensor:
    y = module.product(x)
    return y + torch.autograd.grad(y.sum(), x, retain_graph=True, create_graph=create_graph)[0]


def stiff(module: Inside, x: Tensor) -> Tensor:
    return force(module, x, create_graph=True)


def by_slope(module: Inside, x: Tensor) -> Tensor:
    y = module.product(x)
    return y * torch.autograd.grad(y.sum(), module.a.weight, retain_graph=True)[0].square().sum()


def mapped(module: Inside, x: Tensor) -> Tensor:
    return torch.vmap(module.product)(x)


def directional(module: Inside, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(module.product(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


class Unfelt(torch.autograd.Function):
    """Passes on, and gives no gradient at all."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


class Ignored(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return input + Unfelt.apply(super().forward(input))


def sparsely_tied() -> nn.Module:
    module = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 9, bias=False))
    module[1].weight = module[0].weight
    return module


def complex_linear() -> nn.Module:
    return nn.Linear(4, 4, dtype=torch.complex128)


def half_frozen() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    return layer


def half_compiled() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    module[0].compile(backend="eager")
    return module


def vectors() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, requires_grad=True)


def images(size: int = 7) -> Tensor:
    return torch.randn(2, 4, size, size, dtype=torch.float64, requires_grad=True)


def rows() -> Tensor:
    return torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)


def words() -> Tensor:
    return torch.randint(9, (3, 5))


def sequence() -> Tensor:
    return rows().transpose(1, 2)[..., :4]


LAYER = {"weight", "bias"}
INNER = {f"inner.{i}.{name}" for i in (0, 2) for name in LAYER}
BOTH = {f"{layer}.{name}" for layer in "ab" for name in LAYER}
FEED_FORWARD = {f"linear{i}.{name}" for i in (1, 2) for name in LAYER}

# A module, its input, and the parameters whose gradients must wait for W.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], set[str]]] = {
    "linear": (lambda: nn.Linear(4, 3), vectors, LAYER),
    "linear of a vector": (lambda: nn.Linear(4, 3), lambda: vectors()[0], LAYER),
    "linear of more dimensions": (lambda: nn.Linear(9, 3, bias=False), rows, {"weight"}),
    "linear of nothing": (lambda: nn.Linear(4, 3), lambda: vectors()[:0], LAYER),
    "subclass": (lambda: Doubled(4, 3), vectors, LAYER),
    "subclass that uses the weight otherwise too": (lambda: Written(4, 3), vectors, {"bias"}),
    "adapter": (Adapted, vectors, {"down.weight", "up.weight"}),
    "tied and used twice": (Tied, words, {"words.weight", "head.weight", "inner.weight", "inner.bias"}),
    "views": (Viewed, vectors, {"inner.weight", "inner.bias"}),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), rows, LAYER),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), bias=False), images, {"weight"}),
    "conv2d of one image": (lambda: nn.Conv2d(4, 6, 3), lambda: images()[0], set()),
    "conv2d, padded to the same size": (lambda: nn.Conv2d(4, 6, 3, padding="same"), images, set()),
    "conv2d, circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), images, set()),
    "conv3d": (lambda: nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv3d(4, 2, (1, 3, 3))), images, set()),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=-2), words, {"weight"}),
    "embedding by frequency": (lambda: nn.Embedding(9, 4, scale_grad_by_freq=True), words, {"weight"}),
    "embedding, renormed": (lambda: nn.Embedding(9, 4, max_norm=0.5), words, set()),
    "embedding, sparse": (lambda: nn.Embedding(9, 4, sparse=True), words, set()),
    "frozen": (lambda: nn.Linear(4, 4).requires_grad_(False), vectors, set()),
    "half frozen": (half_frozen, vectors, set()),
    "parametrised": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), vectors, set()),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0), sequence, FEED_FORWARD),
    "checkpointed": (lambda: Checkpointed(False), vectors, INNER),
    "checkpointed, reentrant": (lambda: Checkpointed(True), vectors, INNER),
    "checkpointed by the layer itself": (lambda: OwnCheckpoint(4, 4), vectors, set()),
    "in place after a product": (
        lambda: nn.Sequential(nn.Linear(9, 3), nn.ReLU(inplace=True)),
        rows,
        {"0.weight", "0.bias"},
    ),
    "linear to nothing": (lambda: nn.utils.skip_init(nn.Linear, 4, 0), vectors, LAYER),
    "complex": (complex_linear, lambda: torch.randn(3, 4, dtype=torch.complex128, requires_grad=True), set()),
    "gradient of the input inside": (lambda: Inside(force), vectors, BOTH),
    "gradient of the input, differentiated again": (lambda: Inside(stiff), vectors, {"a.bias", "b.bias"}),
    "gradient of a weight inside": (lambda: Inside(by_slope), vectors, BOTH),
    "vmap": (lambda: Inside(mapped), vectors, set()),
    "forward mode": (lambda: Inside(directional), vectors, {"b.bias"}),
    "parametrised subclass": (lambda: parametrizations.spectral_norm(Squared(4, 4)), vectors, set()),
    "output without a gradient": (lambda: Ignored(4, 4), vectors, LAYER),
    "sparse and dense": (sparsely_tied, words, set()),
    "compiled": (half_compiled, vectors, {"1.weight", "1.bias"}),
}
