"""Waits: a slow rank is waited for, a frozen one is named, Ctrl-C goes through, a closed pipeline says so."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from tests.launch import launch


def _batch() -> tuple[Tensor, Tensor]:
    return torch.ones(8, 4), torch.ones(8, 4)


def _two_stages(**options: Any) -> pk.Pipeline:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return pk.Pipeline(net, loss_fn=nn.MSELoss(), microbatches=8, **options)


def _slow(transport: str, method: str) -> float:
    """Rank 1 is five times slower than the deadline, once."""
    with _two_stages(timeout=0.5, transport=transport) as pipe:
        pipe.train_step(*_batch())
        if os.environ["RANK"] == "1":
            time.sleep(2.5)  # a slow loader: the process lives, and holds no lock
        return getattr(pipe, method)(*_batch()).item()


@pytest.mark.parametrize("transport", ["shm", "dist"])
@pytest.mark.parametrize("method", ["train_step", "eval_step"])
def test_slow_rank_is_waited_for(transport: str, method: str) -> None:
    """Also where more micro-batches than slots are on their way to it, so that sends wait at the end of a step."""
    outcomes = launch(_slow, 2, transport, method)
    assert all(outcome.error is None for outcome in outcomes), [outcome.error for outcome in outcomes]
    assert outcomes[0].value == outcomes[1].value


def _frozen(method: str) -> str:
    pipe = _two_stages(timeout=1.0, transport="shm")
    pipe.train_step(*_batch())
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        getattr(pipe, method)(*_batch())
    except pk.PeerFrozen as error:
        assert error.rank == 1
        return str(error)
    return "nothing"


@pytest.mark.parametrize("method", ["train_step", "eval_step"])
def test_frozen_rank_is_named(method: str) -> None:
    """Stopped, it is alive for the kernel, but says nothing for the whole deadline."""
    waiting, stopped = launch(_frozen, 2, method, timeout=6)
    assert waiting.error is None, waiting.error
    assert "rank 1" in waiting.value
    assert stopped.error is not None


def _interrupted() -> str:
    """Rank 0 gets Ctrl-C while it waits for rank 1."""
    pipe = _two_stages()
    pipe.train_step(*_batch())
    if os.environ["RANK"] == "0":
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
    else:
        time.sleep(1.5)  # not there yet
    try:
        pipe.train_step(*_batch())
    except (KeyboardInterrupt, pk.Aborted) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_control_c_ends_a_wait_and_the_job() -> None:
    waiting, other = launch(_interrupted, 2)
    assert waiting.value.startswith("KeyboardInterrupt"), waiting
    assert other.value.startswith("Aborted"), other
    assert "rank 0" in other.value
    assert "KeyboardInterrupt" in other.value


def test_closed_pipeline_says_so() -> None:
    pipe = _two_stages(ranks=2)
    pipe.train_step(*_batch())
    pipe.close()
    pipe.close()
    with pytest.raises(pk.TransportError, match=r"closed: close\(\) was called; make a new one"):
        pipe.train_step(*_batch())
    assert all(p.grad is not None for p in pipe.parameters())
