"""Values that skip stages, relayed, sent directly and handed over, against the unsplit module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.runtime.step import PLACES, check, gradients, make_seeded, run

save, join = pk.Skip.save, pk.Skip.join
SCHEDULES = ["1f1b", "interleaved-1f1b", "zb-h1", "zb-v", "v-half"]  # the others in the whole grid
RUNNABLE = [name for name in pk.schedule.names() if pk.schedule.describe(name).runnable]


class Attend(nn.Module):
    """A decoder's layer: looks at what an encoder made, with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

    def forward(self, value: Tensor, memory: Tensor) -> Tensor:
        return value + self.out((self.query(value) @ memory.transpose(-1, -2)).softmax(-1) @ memory)


class Concatenate(nn.Module):
    """A U-Net's way back up: twice the size, beside what was there on the way down."""

    def forward(self, value: Tensor, saved: Tensor) -> Tensor:
        return torch.cat([F.interpolate(value, scale_factor=2), saved], dim=1)


def unet() -> pk.Skip:
    """Three levels, nested skips."""

    def conv(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(1, b), nn.SiLU()]

    return pk.Skip(
        *conv(1, 2), save("fine"), nn.MaxPool2d(2),
        *conv(2, 4), save("coarse"), nn.MaxPool2d(2),
        *conv(4, 4),
        join("coarse", Concatenate()), *conv(8, 4),
        join("fine", Concatenate()), *conv(6, 2),
        nn.Conv2d(2, 1, 1),
    )  # fmt: skip


def crossing() -> pk.Skip:
    """Skips that cross, one joined three times, one from the first layer to the last, and a batch itself."""
    return pk.Skip(
        save("x"), nn.Linear(4, 4), save("long"), nn.Tanh(), nn.Linear(4, 4), save("a"), nn.Tanh(), nn.Linear(4, 4),
        join("x", torch.add), save("b"), nn.Tanh(), join("a", torch.mul), nn.Linear(4, 4), join("b", torch.add),
        nn.Tanh(), join("a", torch.sub), nn.Linear(4, 4), join("a", torch.add), nn.Tanh(), join("long", torch.add),
    )  # fmt: skip


def translator() -> pk.Skip:
    """Encoder and decoder: the encoder's output is joined by every layer of the decoder."""
    return pk.Skip(
        save("x"), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), save("memory"),
        join("x", lambda memory, x: x + 1), nn.Linear(4, 4), join("memory", Attend()), nn.Tanh(),
        join("memory", Attend()), nn.Linear(4, 4), join("memory", Attend()), nn.Linear(4, 4), nn.Linear(4, 4),
    )  # fmt: skip


def _batch(make: Any, samples: int = 9) -> tuple[Tensor, Tensor]:
    shape = (samples, 1, 8, 8) if make is unet else (samples, 3, 4)
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def _heavy(make: Any) -> pk.LayerCosts:
    """Costs by which a copy takes longer than anything else, so that all that can be is sent directly."""
    names = tuple(map(str, range(len(make()))))
    ones = (1.0,) * len(names)
    return pk.LayerCosts(names, ones, ones, ones, (1e4,) * len(names))


CASES = [
    pytest.param(make, schedule, ranks, heavy, marks=[] if schedule in SCHEDULES else [pytest.mark.full])
    for make in (unet, crossing, translator)
    for schedule in RUNNABLE
    for ranks in (2, 3, 4)
    for heavy in (False, True)
    if len(make()) >= ranks * pk.schedule.describe(schedule).chunks[0]
]


@pytest.mark.parametrize(("make", "schedule", "ranks", "heavy"), CASES)
def test_gradients(make: Any, schedule: str, ranks: int, heavy: bool) -> None:
    """In one process, relayed and directly."""
    split = _heavy(make) if heavy else None
    options: dict[str, Any] = {"microbatches": 2 * ranks, "schedule": schedule, "split": split}
    check(make, F.mse_loss, *_batch(make), processes=False, seed=ranks, ranks=ranks, **options)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "v-half"])
@pytest.mark.parametrize("heavy", [False, True])
def test_gradients_among_processes(schedule: str, heavy: bool) -> None:
    split = _heavy(crossing) if heavy else None
    options: dict[str, Any] = {"microbatches": 6, "schedule": schedule, "split": split}
    check(crossing, F.mse_loss, *_batch(crossing), processes=True, seed=1, ranks=3, **options)


def test_a_gradient_that_is_handed_over_keeps_no_slot() -> None:
    """Stage 4's joined value is saved on stage 1 of the same rank, which goes backward long after: the gradient is a
    view of what stage 5 has sent, whose next messages must find slots.
    """
    options: dict[str, Any] = {"microbatches": 6, "schedule": "interleaved-1f1b", "split": _heavy(unet)}
    check(unet, F.mse_loss, *_batch(unet), processes=True, seed=3, ranks=3, **options)


@pytest.mark.parametrize("transport", ["shm", "dist"])
@pytest.mark.full
def test_transports(transport: str) -> None:
    options: dict[str, Any] = {"microbatches": 8, "split": _heavy(unet), "transport": transport}
    check(unet, F.mse_loss, *_batch(unet), processes=True, seed=2, ranks=4, **options)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute(recompute: str) -> None:
    options: dict[str, Any] = {"schedule": "zb-h1", "split": _heavy(unet), "recompute": recompute}
    check(unet, F.mse_loss, *_batch(unet), processes=False, seed=3, ranks=3, **options)


def _steps(ranks: int, seed: int, heavy: bool) -> list[float]:
    """Errors of two models in one process in turn, dropout included, and of their evaluation."""
    make = lambda: pk.Skip(*crossing(), nn.Dropout(0.5))  # noqa: E731
    errors = []
    options: dict[str, Any] = {"loss_fn": F.mse_loss, "microbatches": 5, "ranks": ranks, "timeout": 20.0}
    options["split"] = _heavy(make) if heavy else None
    with pk.Pipeline(make_seeded(make, seed), seed=seed, **options) as one:
        torch.manual_seed(seed)
        x, y = _batch(make, 7)
        for _ in range(2):
            found = pk.verify(one, x, y)
            one.train_step(x, y)
            errors += [found.max_error, found.loss_error]
        outputs = one.eval_step(x)
        if outputs is not None:
            errors.append(float((outputs - make_seeded(make, seed).eval()(x)).detach().abs().max()))
        assert any(p is not None for p in gradients(one).values())
    return errors


@PLACES
@pytest.mark.parametrize("heavy", [False, True])
def test_verify_and_eval_step(processes: bool, heavy: bool) -> None:
    for errors in run(processes, _steps, 3, 4, heavy):
        assert max(errors) <= 1e-12


def test_measured_costs() -> None:
    """A large tensor past small ones, as ``pk.profile`` sees it, among more ranks than two; and the split it gives."""

    def make() -> pk.Skip:
        wide = [nn.Linear(4, 4096), save("wide"), nn.AdaptiveAvgPool1d(8)]
        narrow = [nn.Linear(8, 8) for _ in range(6)]
        return pk.Skip(*wide, *narrow, join("wide", lambda value, saved: value.sum(-1) * saved.mean(-1)))

    x, y = torch.randn(1024, 4, dtype=torch.float64), torch.randn(1024, dtype=torch.float64)
    net = make_seeded(make, 0)
    costs = pk.profile(net, x[:256])
    with pk.Pipeline(net, loss_fn=F.mse_loss, microbatches=4, ranks=4, split=costs) as pipe:
        assert [(hop.name, hop.target, hop.direct) for hop in pipe.skips] == [("wide", 3, True)]
        assert pk.verify(pipe, x, y).max_error <= 1e-12


def test_two_models_in_turn() -> None:
    """Steps of one between those of the other; the same names."""
    x, y = _batch(crossing)
    options: dict[str, Any] = {"loss_fn": F.mse_loss, "microbatches": 3, "ranks": 2}
    with (
        pk.Pipeline(make_seeded(crossing, 1), **options) as one,
        pk.Pipeline(make_seeded(crossing, 2), split=_heavy(crossing), **options) as other,
    ):
        for _ in range(2):
            assert pk.verify(one, x, y).max_error <= 1e-12
            assert pk.verify(other, x, y).max_error <= 1e-12
            one.train_step(x, y)
            other.train_step(x, y)


def test_specs() -> None:
    """A list of specs: verify builds the unsplit model from them."""
    layers = [("a", 4), ("b", 4)]
    specs = [pk.LayerSpec(nn.Linear, 4, 4, dtype=torch.float64)]
    for name, width in layers:
        specs += [pk.LayerSpec(save, name), pk.LayerSpec(nn.Tanh)]
        specs += [pk.LayerSpec(nn.Linear, 4, width, dtype=torch.float64)]
    specs += [pk.LayerSpec(join, "a", torch.add), pk.LayerSpec(nn.Tanh), pk.LayerSpec(join, "b", torch.mul)]
    with pk.Pipeline(specs, loss_fn=F.mse_loss, microbatches=3, ranks=3) as pipe:
        assert pk.verify(pipe, *_batch(None)).max_error <= 1e-12


class Counting(nn.Module):
    """Logits whose largest is the next token, out of tokens and out of what skipped."""

    def forward(self, h: Tensor, tokens: Tensor) -> Tensor:
        return F.one_hot((tokens + 1) % 10, 10) + 0.1 * h.sigmoid()


def counting() -> pk.Skip:
    layers = [layer for _ in range(3) for layer in (nn.Linear(10, 10), nn.Tanh())]
    return pk.Skip(save("tokens"), nn.Embedding(10, 10), *layers, join("tokens", Counting()))


def _texts(ranks: int, heavy: bool) -> list[list[int]]:
    options: dict[str, Any] = {"split": _heavy(counting) if heavy else None, "loss_fn": F.mse_loss, "microbatches": 4}
    torch.manual_seed(0)
    with pk.Pipeline(counting(), ranks=ranks, timeout=20.0, **options) as pipe:
        assert any(hop.direct for hop in pipe.skips) == heavy
        prompts = [torch.tensor(row) for row in ([1, 2], [4, 5], [7], [0, 1], [3, 5, 4])]
        return [row.tolist() for row in pipe.generate(prompts, 3)]


@PLACES
@pytest.mark.parametrize("heavy", [False, True])
def test_generate(processes: bool, heavy: bool) -> None:
    """Integers skip from the first stage to the last, where they alone say what comes next."""
    for got in run(processes, _texts, 3, heavy):
        assert got == [[1, 2, 3, 4, 5], [4, 5, 6, 7, 8], [7, 8, 9, 0], [0, 1, 2, 3, 4], [3, 5, 4, 5, 6, 7]]


class Fails(nn.Module):
    """Raises in its third forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, value: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise ValueError("third")
        return value


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_after_a_failure_it_can_be_used_again(schedule: str) -> None:
    """What was on its way to another stage is forgotten."""

    def make() -> pk.Skip:
        return pk.Skip(*list(crossing())[:-1], Fails(), join("long", torch.add))

    x, y = _batch(make)
    options: dict[str, Any] = {"microbatches": 6, "ranks": 3, "schedule": schedule, "split": _heavy(make)}
    with pk.Pipeline(make_seeded(make, 5), loss_fn=F.mse_loss, **options) as pipe:
        with pytest.raises(ValueError, match="third"):
            pipe.train_step(x, y)
        for parameter in pipe.parameters():
            parameter.grad = None
        assert pk.verify(pipe, x, y).max_error <= 1e-12


# -- before anything starts, and what a step sends


def test_faults_are_refused_before_anything_starts() -> None:
    net = pk.Skip(save("a"), nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(pk.ConfigError, match="never joined"):
        pk.Pipeline(net, loss_fn=F.mse_loss, microbatches=2, ranks=2)


def _messages(make: Any, **options: Any) -> tuple[list[tuple[Any, ...]], int]:
    """The hops, and the messages of a step."""
    with pk.Pipeline(make_seeded(make, 0), loss_fn=F.mse_loss, microbatches=4, **options) as pipe:
        pipe.train_step(*_batch(make))
        return [tuple(hop) for hop in pipe.skips], pipe.timeline().messages


def _chain() -> pk.Skip:
    linear = [nn.Linear(4, 4) for _ in range(6)]
    return pk.Skip(linear[0], save("a"), *linear[1:], join("a", torch.add))


def test_within_a_stage_nothing_is_sent() -> None:
    def make() -> pk.Skip:
        return pk.Skip(nn.Linear(4, 4), save("a"), nn.Linear(4, 4), join("a", torch.add), nn.Linear(4, 4))

    assert _messages(make, ranks=2, split=[4, 1]) == ([], 8)


def test_messages() -> None:
    """Four stages, four micro-batches: 24 messages between neighbours; a direct skip adds one each way."""
    assert _messages(_chain, ranks=4) == ([("a", 0, 3, False)], 24)
    assert _messages(_chain, ranks=4, split=_heavy(_chain)) == ([("a", 0, 3, True)], 32)


def test_on_one_rank_it_is_handed_over() -> None:
    """With V placement the first and the last stage are on one rank."""
    assert _messages(_chain, ranks=2, schedule="v-half") == ([("a", 0, 3, True)], 16)


@pytest.mark.parametrize(("copy", "direct"), [(0.0, False), (14.0, False), (16.0, True), (1e4, True)])
def test_the_cheaper_way_is_taken(copy: float, direct: bool) -> None:
    """Four equal ranks and four micro-batches: 2100 µs, and 11 copies relayed, or 5 and ten messages of 9 µs."""
    names = tuple(map(str, range(8)))
    costs = pk.LayerCosts(names, (50.0,) * 8, (50.0,) * 8, (50.0,) * 8, (copy,) * 8)
    (hop,), _ = _messages(_chain, ranks=4, split=costs)
    assert hop[3] == direct
