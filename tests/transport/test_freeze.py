"""A peer that is stopped, by SIGSTOP, is named; with any transport between processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.transport.programs import ON_FAKE_CUDA, ON_GPU, PROCESSES, SHM, Ends, receive, send
from tests.transport.test_faults import Steps, run_to_failure, told, wait_for_failure

SHM_IN_FULL = pytest.param("shm", marks=[*SHM.marks, pytest.mark.full])  # the watcher is that of the CUDA transport


def stopped(ends: Ends) -> Steps:
    if ends.rank == 1:
        yield from send(ends, "1>0", 0, os.getpid())
        yield None
        os.kill(os.getpid(), signal.SIGSTOP)
        return told(wait_for_failure(ends, "check"))  # rank 0 lets it go on
    pid = (yield from receive(ends, "1>0", 0)).value if ends.rank == 0 else 0
    yield None
    error = wait_for_failure(ends, "recv")
    if pid:
        os.kill(pid, signal.SIGCONT)
    return told(error)


@pytest.mark.parametrize("transport", PROCESSES)
@pytest.mark.parametrize("timeout", [0.5, pytest.param(60.0, marks=pytest.mark.full)])
def test_a_stopped_rank_is_frozen(transport: str, timeout: float) -> None:
    for outcome in run_to_failure(transport, stopped, timeout=timeout):
        assert outcome.error is None, outcome.error
        assert outcome.value[:2] == ("PeerFrozen", 1)


def stopped_host(ends: Ends, folder: Path) -> Steps:
    """Rank 0 holds the store, which is so frozen too. Nothing but messages says when it may stop, and nothing but files
    when it may go on.
    """
    if ends.rank == 0:
        yield from send(ends, "0>1", 0, os.getpid())
    pid = (yield from receive(ends, "0>1", 0)).value if ends.rank == 1 else 0
    if ends.rank < 3:
        yield from receive(ends, f"{ends.rank + 1}>{ends.rank}", 1)
    if ends.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        return told(wait_for_failure(ends, "check"))  # rank 1 lets it go on
    yield from send(ends, f"{ends.rank}>{ends.rank - 1}", 1, "ready")
    start = time.monotonic()
    error = wait_for_failure(ends, "recv")
    took = time.monotonic() - start
    (folder / str(ends.rank)).touch()
    while pid and len(list(folder.iterdir())) < 3:
        time.sleep(0.01)
    if pid:
        os.kill(pid, signal.SIGCONT)
    while any(thread.name == "pipekern control" for thread in threading.enumerate()):
        time.sleep(0.01)  # it waits for the store, which answers again
    return (*told(error), took)


@pytest.mark.parametrize("transport", ["dist", ON_FAKE_CUDA[0], SHM_IN_FULL, ON_GPU])
def test_a_frozen_rank_is_named_within_ten_seconds(transport: str, tmp_path: Path) -> None:
    """With the default timeout of 60 s; also where the store is frozen with it."""
    for outcome in run_to_failure(transport, stopped_host, tmp_path, store="rank 0")[1:]:
        assert outcome.error is None, outcome.error
        kind, rank, text, took = outcome.value
        assert (kind, rank) == ("PeerFrozen", 0) and "timeout" in text and took < 10
