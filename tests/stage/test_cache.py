"""Caches: what a layer keeps, who is given one, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from pipekern.stage.cache import Cache, Caches, takes_cache


def test_golden() -> None:
    """Two tokens, then one, of which the layer sees all three."""
    cache = Cache(capacity=4)
    first = torch.tensor([[[1.0], [2.0]]])
    assert cache.append(first)[0].tolist() == [[[1], [2]]]
    cache.begin(length=2)
    (known,) = cache.append(torch.tensor([[[3.0]]]))
    assert known.tolist() == [[[1], [2], [3]]]
    first.zero_()
    assert known.tolist() == [[[1], [2], [3]]], "it kept the caller's memory"


@pytest.mark.parametrize("dim", [1, -2, 2, -1])
def test_all_tokens_come_back(dim: int, seed: int) -> None:
    keys, values = torch.randn(2, 5, 6, 7), torch.randn(2, 5, 6, 7, dtype=torch.float64)
    size = keys.shape[dim]
    cache = Cache(size)
    for start, length in ((0, 2), *((at, 1) for at in range(2, size))):
        cache.begin(start)
        got = cache.append(keys.narrow(dim, start, length), values.narrow(dim, start, length), dim=dim)
        assert torch.equal(got[0], keys.narrow(dim, 0, start + length))
        assert torch.equal(got[1], values.narrow(dim, 0, start + length))


def _begun(*shapes: tuple[int, ...]) -> Cache:
    cache = Cache(4)
    cache.append(*(torch.zeros(shape) for shape in shapes))
    cache.begin(2)
    return cache


REFUSED = [
    ("another shape", (1, 1, 3), "tokens along dimension -2"),
    ("rows that would be spread", (1, 1, 2), "only the number of tokens may change"),
    ("too many tokens", (2, 3, 3), "after 2 tokens"),
]


@pytest.mark.parametrize(("shape", "told"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused_shapes(shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(pk.ConfigError, match=told):
        _begun((2, 2, 3)).append(torch.zeros(shape))


def test_refused_calls() -> None:
    with pytest.raises(pk.ConfigError, match="got 1 tensors, and 2 before"):
        _begun((2, 2, 3), (2, 2, 3)).append(torch.zeros(2, 1, 3))
    cache = _begun((2, 2, 3))
    cache.append(torch.zeros(2, 1, 3))
    with pytest.raises(pk.ConfigError, match="twice in one forward"):
        cache.append(torch.zeros(2, 1, 3))
    late = Cache(4)
    late.begin(2)
    with pytest.raises(pk.ConfigError, match="first called after 2 tokens"):
        late.append(torch.zeros(2, 1, 3))


class Taker(nn.Module):
    """Remembers what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Any] = []

    def forward(self, x: Tensor, cache: Cache | None = None, scale: float = 1.0) -> Tensor:
        self.given.append(cache)
        return x * scale


class Twice(nn.Module):
    """Calls one layer twice, the second time with an explicit None, and then with a cache of its own."""

    def __init__(self, own: Cache) -> None:
        super().__init__()
        self.layer, self.own = Taker(), own

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(self.layer(x), None, 2.0), cache=self.own)


def test_who_is_given_one() -> None:
    """Modules however deep; a cache for each call, each stage and each group; and afterwards none."""
    own = Cache(1)
    model = Twice(own)
    assert takes_cache(model.layer) and not takes_cache(model)
    caches = Caches([*model.modules(), *model.modules()])
    with caches.given():
        for stage, group in ((0, 0), (0, 1), (1, 0), (0, 0)):
            caches.begin(stage, group, length=3, capacity=5)
            assert model(torch.ones(1)).item() == 2.0
        caches.drop(0, 0)
        caches.begin(0, 0, length=0, capacity=5)
        model(torch.ones(1))
    given = model.layer.given
    assert given[2::3] == [own] * 5
    of_calls = [cache for at, cache in enumerate(given) if at % 3 < 2]
    assert len({id(cache) for cache in of_calls}) == 8, "two calls in three places, and two after the drop"
    assert of_calls[6:8] == of_calls[:2]
    assert of_calls[8] is not of_calls[0]
    assert [cache.length for cache in of_calls[8:]] == [0, 0]
    model(torch.ones(1))
    assert given[15:] == [None, None, own]
