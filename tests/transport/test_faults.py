"""What every transport between processes does when ranks fail: real kills, stops and errors.

Deadlines here are 60 s unless a test is about the deadline itself, and a launch is killed after less: so an error that
arrives was not found by waiting for the deadline. Nothing is timed. (Seen: at most 0.2 s from a kill to the last rank's
error, with 1 GB resident.)
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator
from typing import Any

import pytest
import torch

from pipekern.errors import Aborted, PeerDied, TransportError, TransportTimeout
from pipekern.transport.base import Link
from tests.launch import Outcome, launch
from tests.transport.programs import PATIENCE, PROCESSES, Ends, Program, rank_main, receive, run, send

Steps = Generator[str | None, None, Any]
on_processes = pytest.mark.parametrize("transport", PROCESSES)
CHAIN = [Link(f"{a}>{b}", a, b, 2) for a, b in [(0, 1), (1, 2), (2, 3), (3, 2), (2, 1), (1, 0)]]


def run_to_failure(
    transport: str, program: Program, *args: Any, timeout: float = 60.0, store: str = "outside"
) -> list[Outcome]:
    """Every rank's end, of four in a chain; no rank may hang."""
    limit = 1.5 * PATIENCE
    outcomes = launch(rank_main, 4, transport, program, args, CHAIN, timeout, timeout=limit, store=store)
    for outcome in outcomes:
        assert "did not end" not in (outcome.error or ""), (outcome.error, outcome.output)
    return outcomes


def wait_for_failure(ends: Ends, kind: str) -> BaseException:
    """The error that this rank meets: while it waits for a message, or in check() while it computes."""
    deadline = time.monotonic() + PATIENCE
    with pytest.raises(TransportError) as caught:
        while time.monotonic() < deadline:
            if kind == "check":
                ends.transport.check()
                time.sleep(0.001)
            else:
                next(iter(ends.receivers.values())).recv(0)
    for receiver in ends.receivers.values():  # and nothing is returned afterwards
        with pytest.raises(type(caught.value)):
            receiver.recv(0, wait=0.0)
    for sender in ends.senders.values():
        with pytest.raises(type(caught.value)):
            sender.send(0, 1)
    return caught.value


def told(error: BaseException) -> tuple[str, int, str]:
    assert isinstance(error, TransportError)
    return type(error).__name__, error.rank, str(error)


def killed(ends: Ends, victim: int) -> Steps:
    for link, sender in ends.senders.items():  # what arrived before the failure is not returned after it
        assert sender.send(0, torch.ones(2)), link
    yield None
    if ends.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return told(wait_for_failure(ends, "check"))


@on_processes
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_on_every_other(transport: str, victim: int) -> None:
    outcomes = run_to_failure(transport, killed, victim)
    for outcome in outcomes:
        if outcome.rank == victim:
            assert outcome.exitcode == -signal.SIGKILL
        else:
            kind, rank, text = outcome.value
            assert (kind, rank) == ("PeerDied", victim) and f"rank {victim}" in text


def killed_while_waited_for(ends: Ends, victim: int) -> Steps:
    yield None
    if ends.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return told(wait_for_failure(ends, "recv"))


@on_processes
def test_who_waits_for_a_neighbour_learns_of_another_ranks_death(transport: str) -> None:
    outcomes = run_to_failure(transport, killed_while_waited_for, 3)
    assert [outcome.value[:2] for outcome in outcomes[:3]] == [("PeerDied", 3)] * 3


def killed_with_child(ends: Ends) -> Steps:
    """The victim has forked, as a data loader does: the child has its sockets."""
    if ends.rank == 3:
        child = os.fork()
        if child == 0:
            time.sleep(3 * PATIENCE)
            os._exit(0)
        yield from send(ends, "3>2", 1, child)
        yield None
        os.kill(os.getpid(), signal.SIGKILL)
    child = (yield from receive(ends, "3>2", 1)).value if ends.rank == 2 else 0
    yield None
    error = wait_for_failure(ends, "recv")
    if child:
        os.kill(child, signal.SIGKILL)  # that it is still there says that the error did not come of its end
    return told(error)


@on_processes
def test_a_forked_child_does_not_hide_a_death(transport: str) -> None:
    outcomes = run_to_failure(transport, killed_with_child)
    assert [outcome.value[:2] for outcome in outcomes[:3]] == [("PeerDied", 3)] * 3


def forked_child_ends(ends: Ends) -> Steps:
    """A forked child that ends in order, also through this module's finalizers, disturbs nobody."""
    if ends.rank == 1:
        child = os.fork()
        if child == 0:
            ends.transport.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    yield None
    if ends.rank == 0:
        yield from send(ends, "0>1", 5, torch.ones(3))
        return (yield from receive(ends, "1>0", 6)).value
    yield from receive(ends, "0>1", 5)
    yield from send(ends, "1>0", 6, "fine")
    return None


@on_processes
def test_a_forked_child_may_end_first(transport: str) -> None:
    assert run(transport, forked_child_ends)[0] == "fine"


def failing(ends: Ends) -> Steps:
    for sender in ends.senders.values():
        assert sender.send(0, torch.ones(2))
    yield None
    if ends.rank == 1:
        try:
            raise ValueError("no good number")
        except ValueError as error:
            ends.transport.abort(error, "rank 1, stage 1, micro-batch 3, instruction 12 (F)")
    return told(wait_for_failure(ends, "check" if ends.rank == 0 else "recv"))


@on_processes
def test_an_error_on_one_rank_is_raised_by_all_with_its_traceback(transport: str) -> None:
    for outcome in run_to_failure(transport, failing):
        assert outcome.error is None, outcome.error
        kind, rank, text = outcome.value
        assert (kind, rank) == ("Aborted", 1)
        for part in ("ValueError: no good number", "test_faults.py", "in failing", "stage 1, micro-batch 3"):
            assert part in text


def first_of_two(ends: Ends) -> Steps:
    yield None
    if ends.rank in (1, 2):
        ends.transport.abort(ValueError(f"of rank {ends.rank}"), f"rank {ends.rank}")
    return told(wait_for_failure(ends, "check"))


@on_processes
def test_the_first_of_two_errors_counts_everywhere(transport: str) -> None:
    told_all = [outcome.value for outcome in run_to_failure(transport, first_of_two)]
    assert len({(kind, rank) for kind, rank, _ in told_all}) == 1
    assert all(f"of rank {rank}" in text for _, rank, text in told_all)


def all_wait(ends: Ends) -> Steps:
    yield None
    return told(wait_for_failure(ends, "recv"))


@on_processes
def test_all_ranks_waiting_is_a_timeout(transport: str) -> None:
    for outcome in run_to_failure(transport, all_wait, timeout=1.0):
        kind, rank, text = outcome.value
        assert (kind, rank) == ("TransportTimeout", -1)
        assert all(f"rank {r}" in text for r in range(4))


def send_without_receiver(ends: Ends) -> Steps:
    """Queued sends that are tried again and again are waiting too."""
    yield None
    tag = 0
    with pytest.raises(TransportTimeout):
        while True:
            sent = [sender.send(tag, torch.ones(2)) for sender in ends.senders.values()]
            tag += sum(sent)
            ends.transport.check()
            time.sleep(0.001)


@on_processes
def test_all_ranks_without_a_free_slot_is_a_timeout(transport: str) -> None:
    for outcome in run_to_failure(transport, send_without_receiver, timeout=1.0):
        assert outcome.error is None, outcome.error


def busy(ends: Ends, timeout: float) -> Steps:
    """Rank 1 computes, without a call to the transport, for longer than the deadline."""
    if ends.rank == 1:
        end = time.monotonic() + 4 * timeout
        matrix = torch.eye(64)
        while time.monotonic() < end:
            matrix = matrix @ matrix
        yield from send(ends, "1>0", 0, "done")
        return None
    return (yield from receive(ends, "1>0", 0)).value


@on_processes
def test_a_busy_rank_is_waited_for(transport: str) -> None:
    assert run(transport, busy, 0.5, timeout=0.5)[0] == "done"


def leaves_early(ends: Ends) -> Steps:
    yield None
    if ends.rank == 1:
        ends.transport.close()
        return None
    with pytest.raises(PeerDied, match="rank 1 has closed its pipeline") as caught:
        ends.receivers["1>0"].recv(0)
    return caught.value.rank


@on_processes
def test_waiting_for_a_rank_that_has_left_is_an_error(transport: str) -> None:
    assert run(transport, leaves_early)[0] == 1


def close_after_failure(ends: Ends) -> Steps:
    yield None
    if ends.rank == 1:
        ends.transport.abort(RuntimeError("root"), "rank 1")
        ends.transport.close()
        return True
    error = wait_for_failure(ends, "recv")
    ends.transport.close()
    ends.transport.close()
    return isinstance(error, Aborted)


@on_processes
@pytest.mark.parametrize("store", ["outside", "rank 0"])
def test_after_a_failure_all_ranks_close_and_leave_nothing(transport: str, store: str) -> None:
    before = set(os.listdir("/dev/shm"))
    assert all(run(transport, close_after_failure, ranks=4, links=CHAIN, store=store))
    assert set(os.listdir("/dev/shm")) <= before


def killed_host(ends: Ends) -> Steps:
    """Rank 0 holds the store. Nothing but messages says when it may die."""
    if ends.rank < 3:
        yield from receive(ends, f"{ends.rank + 1}>{ends.rank}", 0)
    if ends.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from send(ends, f"{ends.rank}>{ends.rank - 1}", 0, "ready")
    return told(wait_for_failure(ends, "recv"))


@on_processes
def test_the_death_of_the_rank_that_holds_the_store(transport: str) -> None:
    outcomes = run_to_failure(transport, killed_host, store="rank 0")
    assert [(o.value and o.value[:2], o.error) for o in outcomes[1:]] == [(("PeerDied", 0), None)] * 3
