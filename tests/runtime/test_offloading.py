"""Activations in host memory: the same bits, whatever leaves; what a memory holds is in a file of its own."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.runtime import huggingface
from tests.runtime.models import make
from tests.runtime.parity import ALL, same_bits
from tests.runtime.step import gradients, run
from tests.runtime.test_offloading_memory import net

SCHEDULES = {"gpipe": 1, "1f1b": 3, "interleaved-1f1b": 2, "zb-h1": 3, "zb-v": 2, "v-half": 3}  # and ranks
KINDS = ["batchnorm", "tied gpt", "lazy", "dataclass, within"]


def test_golden() -> None:
    """One rank, four micro-batches at once; with half of the activations away three are held, as a run counts."""
    model, x, y = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(8, 4), torch.randn(8, 4)
    options: dict[str, Any] = {"loss_fn": F.mse_loss, "microbatches": 4, "ranks": 1, "schedule": "gpipe"}
    with pk.Pipeline(model, offload=0.25, **options) as pipe:
        pipe.train_step(x, y)
        timeline = pipe.timeline()
        assert pipe.offloads.peak_activations() == timeline.peak_activations == [3]
        assert " ".join(f"{span.op}{span.microbatch}" for span in timeline.spans) == (
            "F0 F1 F2 AWAY1 F3 AWAY2 BACK1 BW0 BACK2 BW1 BW2 BW3"
        )
        got = gradients(pipe)
    model.zero_grad()
    with pk.Pipeline(model, **options) as pipe:
        pipe.train_step(x, y)
        assert pipe.offloads.trips == ((),) and pipe.offloads.peak_activations() == [4]
        assert same_bits(gradients(pipe), got)


def _trained(ranks: int, kind: str, seed: int, schedule: str, offload: float | None, how: str) -> tuple[Any, ...]:
    """Two steps that add up, an evaluation between them; state and the user's random numbers after them."""
    torch.manual_seed(seed)
    data = ALL[kind]
    batches = [data.batch(12) for _ in range(2)]
    options: dict[str, Any] = {"loss_fn": data.loss_fn, "microbatches": 6, "schedule": schedule, "recompute": how}
    with pk.Pipeline(make(data, seed), ranks=ranks, seed=seed, offload=offload, timeout=20.0, **options) as pipe:
        losses = pipe.train_step(*batches[0]), pipe.eval_step(*batches[1]), pipe.train_step(*batches[1])
        assert pipe.timeline().peak_activations == pipe.offloads.peak_activations()
        state = {name: value.clone() for name, value in pipe.state_dict().items()}
        return losses, gradients(pipe), state, torch.get_rng_state()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_bits_as_without(schedule: str, seed: int) -> None:
    for kind in KINDS:
        want = _trained(SCHEDULES[schedule], kind, seed, schedule, None, "none")
        for share in (0.4, 1.0):
            assert same_bits(_trained(SCHEDULES[schedule], kind, seed, schedule, share, "none"), want), (kind, share)


@pytest.mark.full
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ALL)
def test_the_same_bits_of_every_kind(kind: str, schedule: str, seed: int) -> None:
    for ranks in (1, 2, 3):
        for how in ("none", "selective", "full"):
            want = _trained(ranks, kind, seed, schedule, None, how)
            for share in (0.3, 0.7, 1.0):
                got = _trained(ranks, kind, seed, schedule, share, how)
                assert same_bits(got, want), (ranks, how, share)


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_with_recomputation(schedule: str, how: str, seed: int) -> None:
    want, got = (_trained(2, "tied gpt", seed, schedule, share, how) for share in (None, 1.0))
    assert same_bits(got, want)


def _both(ranks: int, kind: str, seed: int, schedule: str, how: str) -> list[Any]:
    return [_trained(ranks, kind, seed, schedule, share, how) for share in (None, 0.4, 1.0)]


def _check_processes(kind: str, seed: int, schedule: str, how: str) -> None:
    for want, *others in run(True, _both, 3, kind, seed, schedule, how):
        assert all(same_bits(got, want) for got in others)


def test_among_processes(seed: int) -> None:
    """What came in a slot leaves it early; the sender may write there while the activation is away."""
    _check_processes("tied gpt", seed, "v-half", "none")


@pytest.mark.full
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_among_processes_every_schedule(how: str, schedule: str, seed: int) -> None:
    for kind in ("tied gpt", "batchnorm", "aliased, within"):
        _check_processes(kind, seed, schedule, how)


@pytest.mark.parametrize("name", ["gpt-2", "t5"])
def test_hugging_face(name: str, seed: int) -> None:
    """Forwards that every stage runs for itself; dropout is on."""
    data = huggingface.MODELS[name]
    batch, results = data.batch(8), []
    for share in (None, 1.0):
        torch.manual_seed(seed)
        options: dict[str, Any] = {"microbatches": 4, "ranks": 2, "schedule": "v-half", "inputs": data.inputs}
        model = data.build().to(data.dtype)
        with pk.Pipeline(model, loss_fn=huggingface.loss_fn, offload=share, **options) as pipe:
            results.append((pipe.train_step(*batch), gradients(pipe)))
    assert same_bits(results[1], results[0])


def test_what_is_chosen_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pipekern")
    pk.Pipeline(net(3), loss_fn=F.mse_loss, microbatches=4, ranks=1, schedule="gpipe", offload=0.25).close()
    assert "offload=0.25: rank 0: 2 away, 4 -> 3 at the peak" in caplog.messages


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"offload": 2}, ["offload=2", "from 0 to 1"]),
        ({"offload": "some"}, ["offload='some'", "from 0 to 1"]),
        ({"offload": "auto"}, ["offload='auto'", "pk.profile"]),
        ({"offload": "auto", "recompute": "auto"}, ["both choose", "decide one"]),
        ({"offload": 0.5, "memory": 1e6}, ["memory=1000000.0", "offload=0.5"]),
        ({"offload_folder": "/tmp"}, ["offload_folder", "give offload="]),
    ],
    ids=["two", "some", "no costs", "both", "memory", "nothing away"],
)
def test_refused(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(pk.ConfigError) as refusal:
        pk.Pipeline(net(3), loss_fn=F.mse_loss, microbatches=4, ranks=2, **options)
    assert [part for part in parts if part not in str(refusal.value)] == [], str(refusal.value)


class Failing(nn.Module):
    """Raises in its forward ``at``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.at = 0, -1

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise ValueError("on purpose")
        return x


def test_a_step_after_one_that_failed(seed: int) -> None:
    """At each forward; activations were away, on the way out, and on the way back."""
    model = nn.Sequential(net(2), Failing(), nn.Flatten(0))
    x, y = torch.randn(12, 4, 16), torch.randn(12)
    options: dict[str, Any] = {"loss_fn": F.mse_loss, "microbatches": 6, "ranks": 2, "schedule": "1f1b", "offload": 1.0}
    with pk.Pipeline(model, **options) as pipe:
        pipe.train_step(x, y)
        want = gradients(pipe)
        failing = next(module for module in model.modules() if isinstance(module, Failing))
        for at in range(1, 7):
            failing.calls, failing.at = 0, at
            with pytest.raises(ValueError, match="on purpose"):
                pipe.train_step(x, y)
            failing.at = -1
            for parameter in pipe.parameters():
                parameter.grad = None
            pipe._step = 0  # the same random numbers as in the first
            pipe.train_step(x, y)
            assert same_bits(gradients(pipe), want)


def test_what_is_not_finite_is_found(seed: int) -> None:
    x, y = torch.randn(12, 4, 16), torch.randn(12)
    x[5] = torch.nan
    options: dict[str, Any] = {"loss_fn": F.mse_loss, "microbatches": 6, "ranks": 3, "offload": 1.0}
    with pk.Pipeline(net(5), **options) as pipe, pytest.raises(pk.NumericsError, match=r"micro-batch 2: .* x is not"):
        pipe.train_step(x, y)
