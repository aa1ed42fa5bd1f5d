"""Several pipelines in the same processes, and ranks that do not make the same calls."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.launch import launch, values

TRANSPORTS = pytest.mark.parametrize("transport", ["shm", "dist"])


def _batch(samples: int = 8) -> tuple[Tensor, Tensor]:
    return torch.ones(samples, 4), torch.ones(samples, 4)


def _pipe(transport: str, *layers: nn.Module, **options: Any) -> pk.Pipeline:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, 4))
    defaults: dict[str, Any] = {"loss_fn": F.mse_loss, "microbatches": 4, "transport": transport, "timeout": 20.0}
    return pk.Pipeline(net, **defaults | options)


def _loss() -> float:
    with _pipe("local", ranks=2) as pipe:
        return pipe.train_step(*_batch()).item()


class Bad(nn.Module):
    """Works for one step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 4:
            raise ValueError("a bad layer")
        return x


def _fail_and_start_again(transport: str) -> tuple[list[str], float]:
    kinds = []
    for _ in range(3):
        pipe = _pipe(transport, Bad())
        pipe.train_step(*_batch())
        try:
            pipe.train_step(*_batch())
        except (ValueError, pk.Aborted) as error:
            kinds.append(type(error).__name__)
    with _pipe(transport) as pipe:
        return kinds, pipe.train_step(*_batch()).item()


@TRANSPORTS
def test_a_new_pipeline_after_a_failed_one(transport: str) -> None:
    """In the same processes, as the message about the closed one says."""
    results = values(launch(_fail_and_start_again, 2, transport))
    assert sorted(kinds for kinds, _ in results) == [["Aborted"] * 3, ["ValueError"] * 3]
    assert [loss for _, loss in results] == [_loss()] * 2


def _beside_each_other(transport: str) -> list[float]:
    with _pipe(transport) as one, _pipe(transport, microbatches=2, schedule="gpipe") as two:
        losses = [pipe.train_step(*_batch()).item() for pipe in (one, two, one)]
        return [*losses, two.eval_step(*_batch()).item()]


@TRANSPORTS
def test_two_pipelines_at_once(transport: str) -> None:
    assert values(launch(_beside_each_other, 2, transport)) == [[_loss()] * 4] * 2


def _group_of_ones_own(transport: str) -> tuple[float, float]:
    dist.init_process_group("gloo")
    with _pipe(transport) as pipe:
        loss = pipe.train_step(*_batch()).item()
    sums = torch.ones(1)
    dist.all_reduce(sums)
    dist.destroy_process_group()
    return loss, sums.item()


@TRANSPORTS
def test_a_process_group_that_is_there_is_used_and_left(transport: str) -> None:
    assert values(launch(_group_of_ones_own, 2, transport)) == [(_loss(), 2.0)] * 2


def _in_another_thread(transport: str) -> list[float]:
    losses: list[float] = []

    def work() -> None:
        with _pipe(transport) as pipe:
            losses.append(pipe.train_step(*_batch()).item())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return losses


@TRANSPORTS
def test_another_thread_than_the_main_one(transport: str) -> None:
    assert values(launch(_in_another_thread, 2, transport)) == [[_loss()]] * 2


def _growing(transport: str) -> list[float]:
    with _pipe(transport, microbatches=2) as pipe:
        return [pipe.train_step(*_batch(samples)).item() for samples in (2, 100_000, 4, 300_000, 2)]


@TRANSPORTS
def test_messages_may_grow_by_orders_of_magnitude(transport: str) -> None:
    for losses in values(launch(_growing, 2, transport)):
        assert losses == pytest.approx([_loss()] * 5, rel=1e-5)


def _other_calls(transport: str, calls: list[str]) -> tuple[str, str]:
    pipe = _pipe(transport, timeout=2.0)
    pipe.train_step(*_batch())
    try:
        for call in calls[int(os.environ["RANK"])].split():
            {
                "train": lambda: pipe.train_step(*_batch()),
                "evaluate": lambda: pipe.eval_step(*_batch()),
                "clip": lambda: pipe.clip_grad_norm_(1.0),
                "close": pipe.close,
            }[call]()
    except pk.TransportError as error:
        return type(error).__name__, str(error)
    return "", ""


@TRANSPORTS
def test_ranks_that_take_different_steps(transport: str) -> None:
    """One sees a message that its program does not expect; all raise."""
    results = values(launch(_other_calls, 2, transport, ["evaluate train", "train evaluate"]))
    assert sorted(kind for kind, _ in results) == ["Aborted", "MessageMismatch"]
    assert all("the two ranks run different programs" in text for _, text in results)


@TRANSPORTS
def test_ranks_that_wait_for_each_other(transport: str) -> None:
    """Nobody can go on: at the deadline every rank says who waits for what."""
    for kind, text in values(launch(_other_calls, 2, transport, ["clip train", "train"])):
        assert kind == "TransportTimeout"
        assert "rank 0" in text
        assert "rank 1" in text
        assert "'0>1'" in text


@TRANSPORTS
def test_a_rank_that_closes_too_early(transport: str) -> None:
    closed, waiting = values(launch(_other_calls, 2, transport, ["close", "train"]))
    assert closed == ("", "")
    assert waiting[0] == "PeerDied"
    assert "rank 0 has closed its pipeline" in waiting[1]
    assert "same number of steps" in waiting[1]
