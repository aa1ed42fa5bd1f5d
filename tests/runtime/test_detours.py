"""A value in parts: which leaf is where, and how the parts' gradients add up."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from pipekern.runtime.detours import Spread
from tests.launch import launch, values
from tests.transport import fake_cuda


def _leaf() -> Tensor:
    return torch.zeros(2, requires_grad=True)


def _ones(factor: float) -> Tensor:
    return torch.full((2,), factor)


def test_golden() -> None:
    """A leaf in both parts gets the sum of its gradients; one without any stays without."""
    a, b, c = _leaf(), _leaf(), _leaf()
    spread = Spread((a, b, c, torch.zeros(2)), [(a, b), {"c": c, "b": b}])
    got = spread.gather([[None, _ones(2)], [_ones(4), _ones(3)]])
    assert got[0] is None
    assert torch.equal(torch.stack([g for g in got if g is not None]), torch.tensor([[5.0, 5.0], [4.0, 4.0]]))


def test_one_leaf_and_none() -> None:
    """As stages give them: one tensor alone, nothing where there is no leaf."""
    a = _leaf()
    spread = Spread((a, 1), [{"a": a}, 1])
    one = _ones(2)
    assert spread.gather([one, None]) == [one]
    assert spread.gather([None, None]) == [None]
    assert spread.scatter(one) == [one, None]


def test_what_is_scattered_is_gathered(seed: int) -> None:
    """Every leaf in one part: there and back again."""
    torch.manual_seed(seed)
    leaves = [_leaf() for _ in range(int(torch.randint(2, 9, ())))]
    where = torch.randint(0, 3, (len(leaves),)).tolist()
    parts: list[Any] = [[leaf for leaf, part in zip(leaves, where, strict=True) if part == i] for i in range(3)]
    spread = Spread(list(reversed(leaves)), parts)
    gradients = [torch.randn(2) for _ in leaves]
    back = spread.gather(spread.scatter(gradients))
    assert all(x is y for x, y in zip(back, gradients, strict=True))


def _two_consumers(codec: str, apart: bool) -> tuple[list[str], dict[str, Tensor]]:
    """The links on which gradients were added as they came, and the gradients of a step; ``apart``: none may be."""
    from pipekern.transport.cuda_ends import CudaReceiver

    fake_cuda.load("fake-cuda")
    os.environ.pop("RANK", None)
    torch.manual_seed(0)
    save, join = pk.Skip.save("a"), pk.Skip.join("a", torch.mul)
    net = pk.Skip(nn.Linear(64, 64), save, nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), join)
    ones = (1.0,) * 6
    costs = pk.LayerCosts(tuple(map(str, range(6))), ones, ones, ones, (1e4,) * 6)
    added: list[str] = []
    recv = CudaReceiver.recv

    def spy(self: CudaReceiver, tag: int, wait: float | None = None, into: Tensor | None = None) -> Any:
        message = recv(self, tag, wait, None if apart else into)
        if message is not None and into is not None and message.value is into:
            added.append(self.link.name)
        return message

    CudaReceiver.recv = spy  # type: ignore[method-assign]
    options: dict[str, Any] = {"transport": "cuda", "devices": ["cpu"], "ranks": 3, "codec": codec, "split": costs}
    with pk.Pipeline(net, loss_fn=nn.MSELoss(), microbatches=4, **options) as pipe:
        assert [tuple(hop) for hop in pipe.skips] == [("a", 0, 2, True)]
        x, y = torch.randn(32, 64), torch.randn(32, 64)
        pipe.train_step(x, y)
        return added, {name: p.grad.clone() for name, p in pipe.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("codec", ["bf16", "fp8"])
def test_a_gradient_from_two_consumers_is_added_as_it_comes(codec: str) -> None:
    """What stage 0 saved at its end goes to stages 1 and 2: the gradient that comes second is added to the first."""
    fake_cuda.library()
    (added, gradients), (never, expected) = (
        values(launch(_two_consumers, 1, codec, apart))[0] for apart in (False, True)
    )
    assert (added, never) == (["2>0"] * 4, [])
    assert gradients.keys() == expected.keys() and len(gradients) == 6
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
