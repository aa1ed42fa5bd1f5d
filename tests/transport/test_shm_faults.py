"""Every way in which a job in shared memory fails, caused with real processes; and that nothing is left of it."""

from __future__ import annotations

import atexit
import io
import logging
import os
import secrets
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipekern.errors import Aborted, TransportError
from pipekern.transport.shm import ShmTransport
from tests.launch import launch, values
from tests.transport.shm_job import (
    alone,
    barrier,
    failure_of,
    join,
    neighbours,
    no_data_follows,
    rank_of,
    receive,
    store,
)


def killed_worker(token: str, victim: int, with_children: bool) -> Any:
    transport = join(token)
    senders, receivers = transport.open(neighbours(int(os.environ["WORLD_SIZE"])))
    child = 0
    if with_children:
        child = os.fork()
        if child == 0:
            time.sleep(30)  # a data-loader worker: has inherited everything, is killed below
            os._exit(0)
        store().set(f"child/{rank_of()}", str(child))
    barrier("opened")
    if rank_of() == victim:
        store().set("killed at", repr(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    receiver = next(iter(receivers.values()))
    failure = failure_of(lambda: receiver.recv(0))
    no_data_follows(transport, senders, receivers)
    transport.close()
    late = failure[3] - float(store().get("killed at"))
    if child:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if rank_of() == min({0, 1} - {victim}) and with_children:
        os.kill(int(store().get(f"child/{victim}")), signal.SIGKILL)
    return (*failure[:3], late)


@pytest.mark.parametrize(
    ("world", "victim", "with_children"),
    [
        (3, 2, True),
        (4, 1, False),
        *(
            pytest.param(world, victim, with_children, marks=pytest.mark.full)
            for world in (2, 3, 5)
            for victim in range(world)
            for with_children in (False, True)
        ),
    ],
)
def test_a_killed_rank_is_named_by_every_other(world: int, victim: int, with_children: bool) -> None:
    outcomes = launch(killed_worker, world, secrets.token_hex(16), victim, with_children)
    assert "signal 9" in (outcomes[victim].error or "")
    for name, rank, text, late in values([o for o in outcomes if o.rank != victim]):
        assert (name, rank) == ("PeerDied", victim) and f"rank {victim}" in text
        assert late < 2.0


def stopped_worker(token: str) -> Any:
    transport = join(token, timeout=1.0)
    _, receivers = transport.open(neighbours(3))
    barrier("opened")
    if rank_of() == 1:
        store().set("stopped", str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        return failure_of(transport.check)
    receiver = next(iter(receivers.values()))
    failure = failure_of(lambda: receiver.recv(0))
    if rank_of() == 0:
        os.kill(int(store().get("stopped")), signal.SIGCONT)
    return failure


def test_a_stopped_rank_is_frozen() -> None:
    for name, rank, text, _ in values(launch(stopped_worker, 3, secrets.token_hex(16))):
        assert (name, rank) == ("PeerFrozen", 1) and "rank 1 is frozen" in text and "timeout=" in text


def aborted_worker(token: str) -> Any:
    transport = join(token)
    senders, receivers = transport.open(neighbours(3))
    if rank_of() == 2:
        assert senders["2>1"].send(0, torch.zeros(1))
        barrier("sent")
        try:
            raise ZeroDivisionError("in the model's own code, naïve " + "x" * 20_000 + " the end")
        except ZeroDivisionError as error:
            transport.abort(error, "stage 2, micro-batch 3, instruction F")
        return failure_of(transport.check)
    barrier("sent")
    receiver = receivers["2>1" if rank_of() == 1 else "1>0"]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # rank 1's message is there, and must not be handed out afterwards
        try:
            transport.check()
        except Aborted:
            break
    return failure_of(lambda: receiver.recv(0))


def test_an_exception_reaches_every_rank_with_its_traceback() -> None:
    for name, rank, text, _ in values(launch(aborted_worker, 3, secrets.token_hex(16))):
        assert (name, rank) == ("Aborted", 2)
        assert text.startswith("rank 2 failed, in stage 2, micro-batch 3, instruction F:")
        assert text.rstrip().endswith("the end") and len(text) <= 8192


def mutual_worker(token: str) -> Any:
    transport = join(token, timeout=1.0)
    _, receivers = transport.open(neighbours(2))
    return failure_of(lambda: next(iter(receivers.values())).recv(10 + rank_of()))


def test_ranks_that_wait_for_each_other() -> None:
    for name, rank, text, _ in values(launch(mutual_worker, 2, secrets.token_hex(16))):
        assert (name, rank) == ("TransportTimeout", -1)
        assert "rank 0 waits" in text and "the message with tag 10 on link '1>0' from rank 1" in text
        assert "rank 1 waits" in text and "the message with tag 11 on link '0>1' from rank 0" in text


def busy_worker(token: str) -> Any:
    transport = join(token, timeout=0.5)
    senders, receivers = transport.open(neighbours(2))
    if rank_of() == 0:
        start = time.monotonic()
        while time.monotonic() - start < 2.0:  # a first compile: alive, at work, holding Python's lock
            sum(range(10_000))
        assert senders["0>1"].send(0, "done")
        barrier("received")
        transport.close()
        return "done"
    value = receive(receivers["0>1"], 0)
    barrier("received")
    transport.close()
    return value


def test_a_busy_rank_is_waited_for() -> None:
    assert values(launch(busy_worker, 2, secrets.token_hex(16))) == ["done", "done"]


def logged_worker(token: str) -> Any:
    transport = join(token, timeout=5.0)
    senders, receivers = transport.open(neighbours(2))
    if rank_of() == 0:
        time.sleep(31.0)  # a live peer that does something else: what is tested
        assert senders["0>1"].send(4, "late")
        barrier("received")
        return transport.close()
    log = io.StringIO()
    logging.getLogger("pipekern").addHandler(logging.StreamHandler(log))
    assert receive(receivers["0>1"], 4) == "late"
    barrier("received")
    transport.close()
    return log.getvalue().splitlines()


@pytest.mark.full
def test_a_long_wait_is_logged_each_30_seconds() -> None:
    lines = values(launch(logged_worker, 2, secrets.token_hex(16)))[1]
    assert len(lines) == 1
    assert lines[0].startswith("rank 1 has waited 30 s for the message with tag 4 on link '0>1' from rank 0")


def closed_worker(token: str) -> Any:
    transport = join(token)
    senders, receivers = transport.open(neighbours(2))
    if rank_of() == 0:
        assert senders["0>1"].send(0, torch.ones(2))
        transport.close()
        transport.close()
        no_data_follows(transport, senders, receivers)
        return None
    assert receive(receivers["0>1"], 0).tolist() == [1.0, 1.0]
    assert not receivers["0>1"].ready()
    transport.check()  # nobody has failed
    return failure_of(lambda: receivers["0>1"].recv(1))


def test_a_rank_that_closes_is_no_failure_unless_waited_for() -> None:
    name, rank, text, _ = values(launch(closed_worker, 2, secrets.token_hex(16)))[1]
    assert (name, rank) == ("PeerDied", 0) and "rank 0 has closed its pipeline" in text


def interrupted_worker(token: str) -> Any:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    transport = join(token)
    _, receivers = transport.open(neighbours(2))
    barrier("opened")
    if rank_of() == 0:
        pid = os.getpid()
        threading.Timer(0.5, os.kill, (pid, signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt) as caught:
            receivers["1>0"].recv(0)
        assert time.monotonic() - start < 5.0
        transport.abort(caught.value, "a wait")
        return None
    return failure_of(lambda: receivers["0>1"].recv(0))


def test_ctrl_c_gets_through_a_wait() -> None:
    name, rank, text, _ = values(launch(interrupted_worker, 2, secrets.token_hex(16)))[1]
    assert (name, rank) == ("Aborted", 0) and "KeyboardInterrupt" in text


def exiting_worker(token: str, with_error: bool) -> Any:
    transport = join(token)
    _, receivers = transport.open(neighbours(2))
    barrier("opened")
    if rank_of() == 0:
        if with_error:
            sys.last_value = ValueError("the loader is empty")  # as the interpreter leaves it for an uncaught one
        atexit._run_exitfuncs()
        return None
    return failure_of(lambda: receivers["0>1"].recv(0))


def test_a_program_that_ends_tells_why() -> None:
    name, rank, text, _ = values(launch(exiting_worker, 2, secrets.token_hex(16), True))[1]
    assert (name, rank) == ("Aborted", 0) and "ValueError: the loader is empty" in text
    name, rank, text, _ = values(launch(exiting_worker, 2, secrets.token_hex(16), False))[1]
    assert (name, rank) == ("PeerDied", 0) and "has closed its pipeline" in text


def test_a_forked_child_is_no_rank() -> None:
    transport, sender, receiver = alone(1)
    assert sender.send(0, torch.ones(3))
    view = receive(receiver, 0)
    child = os.fork()
    if child == 0:
        # No assertion may leave this process: pytest would go on in it.
        del view
        texts = [failure_of(call)[2] for call in (transport.check, receiver.ready, lambda: sender.send(1, 1))]
        transport.abort(ValueError("not a rank's to say"), "a child")
        transport.close()
        os._exit(0 if all("forked from rank 0" in text for text in texts) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    transport.check()
    assert not sender.send(1, torch.zeros(1)) and view.tolist() == [1.0, 1.0, 1.0]
    del view
    assert sender.send(1, torch.zeros(1))
    transport.close()


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(TransportError, match="connection of rank 1") as caught:
        ShmTransport(0, 2, secrets.token_hex(16), 0.3, lambda: None)
    assert "timeout=" in str(caught.value)
    with pytest.raises(TransportError, match="has not bound yet"):
        ShmTransport(1, 2, secrets.token_hex(16), 0.3, lambda: None)


# Nothing is left


def listening(token: str) -> list[str]:
    """The local sockets of this job that accept connections."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return [row[7] for row in rows if len(row) > 7 and token in row[7] and int(row[3], 16) & 0x10000]


def left_worker(token: str) -> Any:
    before = len(os.listdir("/proc/self/fd"))
    for turn in range(3):
        transport = join(f"{token}-{turn}", name=f"bound {turn}")
        senders, receivers = transport.open(neighbours(2))
        barrier(f"opened {turn}")
        assert not listening(token)  # all have come
        assert next(iter(senders.values())).send(0, torch.ones(100_000))
        value = receive(next(iter(receivers.values())), 0)
        barrier(f"received {turn}")
        transport.close()
        del transport, senders, receivers, value
    return len(os.listdir("/proc/self/fd")) - before, "memfd:pipekern" in Path("/proc/self/maps").read_text()


def test_nothing_is_left() -> None:
    before = set(os.listdir("/dev/shm"))
    token = secrets.token_hex(16)
    assert values(launch(left_worker, 2, token)) == [(0, False)] * 2
    launch(killed_worker, 2, secrets.token_hex(16), 1, False)
    assert set(os.listdir("/dev/shm")) <= before
    assert not listening(token)
