"""What may go between stages and into the loss: any nesting of tensors and plain values, views, integers, None."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.runtime import reference
from tests.runtime.step import PLACES, SCHEDULES, check, chunks, make_seeded, run


def _batch(samples: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 4, dtype=torch.float64), torch.randn(samples, 4, dtype=torch.float64)


class Pack(nn.Module):
    """Makes a value of every kind that may travel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.layer(x)
        return {
            "hidden": h,
            "several": (torch.tanh(h), [h * 2, None]),
            "constant": x.detach() + 1,
            "mask": x > 0,
            "index": torch.arange(4) + 2**40,
            "nothing": None,
            "flag": True,
            "count": 3,
            "scale": 0.5,
            "name": "pack",
            "shape": x.shape,
            "empty": torch.zeros(0, 4, dtype=x.dtype),
            "scalar": h.mean(),
        }


class Pass(nn.Module):
    """Checks every kind, changes the hidden part, and hands the rest on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, value: dict[str, Any]) -> dict[str, Any]:
        assert list(value)[:2] == ["hidden", "several"]
        assert type(value["several"]) is tuple
        assert type(value["several"][1]) is list
        assert value["nothing"] is None
        assert value["flag"] is True
        assert (value["count"], value["scale"], value["name"]) == (3, 0.5, "pack")
        assert value["mask"].dtype is torch.bool
        assert value["index"].tolist() == [2**40 + i for i in range(4)]
        assert value["shape"] == value["hidden"].shape
        assert value["empty"].shape == (0, 4)
        assert not value["constant"].requires_grad
        return value | {"hidden": self.layer(value["hidden"] * value["mask"])}


class Unpack(nn.Module):
    """A tensor that depends on every tensor in the value."""

    def forward(self, value: dict[str, Any]) -> Tensor:
        bent, (doubled, _) = value["several"]
        mixed = value["hidden"] * value["scale"] + bent * doubled + value["constant"] * value["count"]
        return mixed + value["scalar"] + (value["index"] - 2**40)


def _every_kind() -> nn.Sequential:
    return nn.Sequential(Pack(), Pass(), Pass(), Unpack())


@PLACES
@SCHEDULES
def test_every_kind_of_value_between_stages(processes: bool, schedule: str, seed: int) -> None:
    """dict, tuple, list, None, bool, int, float, str, shapes, several tensors, some without gradients, empty, 0-d."""
    check(_every_kind, F.mse_loss, *_batch(), processes=processes, seed=seed, schedule=schedule, coupled=True)


class Lookup(nn.Module):
    """Sends integers alone: nothing of it is differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 10).long() % 7


def _integers() -> nn.Sequential:
    return nn.Sequential(Lookup(), nn.Identity(), nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 4))


@PLACES
def test_message_of_int64_alone(processes: bool, seed: int) -> None:
    check(_integers, F.mse_loss, *_batch(), processes=processes, seed=seed, split=[2, 3])


class Views(nn.Module):
    """Its outputs are views: transposed, expanded, sliced, of one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.layer(x)
        return h[:, :4], h[:, 4:].flip(0).transpose(0, 1), h[:1, :4].expand(len(x), 4), x


class Join(nn.Module):
    def forward(self, parts: tuple[Tensor, ...]) -> Tensor:
        left, right, first, x = parts
        return (left * right.transpose(0, 1) + first + x).t().contiguous().t()


def _views() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), Views(), Join(), nn.Linear(4, 4), Views(), Join())


@PLACES
@SCHEDULES
def test_outputs_that_are_views(processes: bool, schedule: str, seed: int) -> None:
    check(_views, F.mse_loss, *_batch(), processes=processes, seed=seed, schedule=schedule, coupled=True)


class Skip(nn.Module):
    """Layers between which a skip connection and a mask, both made before them, go along; the model takes a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 6)
        self.sign: Tensor
        self.register_buffer("sign", torch.tensor([1.0, -1.0, 1.0, -1.0]))
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        skip = self.into(x * self.sign)
        h = skip
        for i, layer in enumerate(self.layers):
            h = torch.tanh(layer(h)) * mask[:, None]
            if i % 2:
                h = h + skip
        return {"main": self.out(h), "aside": h.sum(1)}


class _Spread(nn.Module):
    """The unsplit call: a pair is two arguments."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pair: tuple[Tensor, Tensor]) -> Any:
        return self.model(*pair)


def _dict_loss(output: dict[str, Tensor], target: dict[str, Any]) -> Tensor:
    main, (aside, scale) = target["main"], target["rest"]
    return F.mse_loss(output["main"], main) + scale * F.mse_loss(output["aside"], aside)


def _skip_step(ranks: int, seed: int, x: Any, y: Any, schedule: str) -> tuple[float, dict[str, Any], Any]:
    model = make_seeded(Skip, seed)
    with pk.Pipeline(model, loss_fn=_dict_loss, microbatches=4, ranks=ranks, schedule=schedule) as pipe:
        loss = pipe.train_step(x, y)
        outputs = pipe.eval_step(x)
        assert pipe.eval_step(x, y) is not None
        return loss.item(), {n: p.grad for n, p in pipe.named_parameters()}, outputs


@PLACES
@SCHEDULES
def test_skip_connections_tuple_inputs_and_dict_targets(processes: bool, schedule: str, seed: int) -> None:
    """``x`` as a tuple is spread over the forward's arguments, a dict is given by name; outputs are joined again."""
    features, target = _batch()
    mask, aside = (torch.rand(8) > 0.3).double(), torch.randn(8, dtype=torch.float64)
    y = {"main": target, "rest": (aside, 0.25)}
    model = make_seeded(Skip, seed)
    loss = reference.step(_Spread(model), _dict_loss, (features, mask), y).item()
    want = reference.evaluate(model, features, mask)
    for x in ((features, mask), {"mask": mask, "x": features}):
        results = run(processes, _skip_step, 2, seed, x, y, schedule)
        assert all(abs(result[0] - loss) <= 1e-12 for result in results)
        grads = {name: grad for result in results for name, grad in result[1].items()}
        assert reference.distance(grads, reference.gradients(model)) <= 1e-12
        (outputs,) = [result[2] for result in results if result[2] is not None]
        assert reference.distance(outputs, want) <= 1e-12


class Trunk(torch.autograd.Function):
    """The identity, which counts its backwards."""

    walks: list[int] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Trunk.walks.append(1)
        return grad


class Branches(nn.Module):
    """Three outputs of one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = Trunk.apply(self.layer(x))
        return h * 2, h.sin(), h.cos()


class Sum(nn.Module):
    def forward(self, parts: tuple[Tensor, ...]) -> Tensor:
        return parts[0] + parts[1] * parts[2]


def _walks(ranks: int, seed: int, x: Tensor, y: Tensor) -> int:
    Trunk.walks.clear()
    model = make_seeded(_branches, seed)
    with pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=4, ranks=ranks, split=[1, 2]) as pipe:
        pipe.train_step(x, y)
        return len(Trunk.walks)


def _branches() -> nn.Sequential:
    return nn.Sequential(Branches(), Sum(), nn.Linear(4, 4))


@PLACES
def test_tuple_outputs_walk_the_trunk_once(processes: bool, seed: int) -> None:
    assert sum(run(processes, _walks, 2, seed, *_batch())) == 4  # micro-batches
    check(_branches, F.mse_loss, *_batch(), processes=processes, seed=seed)


def _identities() -> nn.Sequential:
    return nn.Sequential(nn.Identity(), nn.Linear(4, 4), nn.Identity(), nn.Identity(), nn.Linear(4, 4), nn.Identity())


@PLACES
@SCHEDULES
def test_identity_stages(processes: bool, schedule: str, seed: int) -> None:
    """What enters leaves; the slot that it came in is given back all the same."""
    ranks, split = 6 // chunks(schedule), [1] * 6
    x, y = _batch(12)
    options: dict[str, Any] = {"schedule": schedule, "split": split, "ranks": ranks, "microbatches": 6}
    check(_identities, F.mse_loss, x, y, processes=processes, seed=seed, **options)


class Unnamed:
    """A class that no message can hold."""


class Strange(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, Unnamed()


def test_value_that_cannot_travel_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Strange(), nn.Identity())
    pipe = pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=2, ranks=2, split=[2, 1])
    with pipe, pytest.raises(pk.ConfigError, match=r"Unnamed"):
        pipe.train_step(torch.randn(4, 4), torch.randn(4, 4))


def _embedded() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_batch_that_requires_a_gradient_gets_it(schedule: str, seed: int) -> None:
    """In one process, as from the unsplit model."""
    x, y = _batch(8)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    F.mse_loss(make_seeded(_embedded, seed)(leaves[0]), y).backward()
    net = make_seeded(_embedded, seed)
    with pk.Pipeline(net, loss_fn=F.mse_loss, microbatches=4, ranks=2, schedule=schedule) as pipe:
        pipe.train_step(leaves[1], y)
    assert leaves[0].grad is not None and leaves[1].grad is not None
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-12, atol=1e-12)
