"""Run a small program on every rank of a transport: in processes, or interleaved in one thread.

A program is a generator over a rank's :class:`Ends`. ``yield`` is a barrier between all ranks; ``yield WAIT`` lets the
others go on. What it returns is the rank's result::

    def program(ends):
        if ends.rank == 0:
            yield from send(ends, "0>1", 7, "hello")
        else:
            message = yield from receive(ends, "0>1", 7)
            return message.value

    assert run("shm", program) == [None, "hello"]
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d as c10d

from pipekern.transport.base import Link, Message, Receiver, Sender, Transport
from pipekern.transport.open import open_transport
from pipekern.transport.world import World, join
from tests.launch import launch, values
from tests.transport import fake_cuda

WAIT = "wait"
PATIENCE = 20.0  # seconds after which a wait inside a program is a fault; nothing is timed by it
PAIR = (Link("0>1", 0, 1, 2), Link("1>0", 1, 0, 2))

Program = Callable[..., Generator[str | None, None, Any]]

_needs_extension = pytest.mark.skipif(
    importlib.util.find_spec("pipekern._C") is None, reason="the C++ extension is not built"
)
SHM = pytest.param("shm", marks=_needs_extension)
# The CUDA transport on the stand-in driver; tests/csrc/cuda runs its C++ in every mode.
_SAMPLE = ("fake-cuda", "fake-mixed-odd")
ON_FAKE_CUDA = [
    pytest.param(name, marks=[_needs_extension, *([] if name in _SAMPLE else [pytest.mark.full])])
    for name in fake_cuda.KNOBS
]
FROM_CPU = pytest.param("fake-mixed-even", marks=_needs_extension)  # rank 0 on the CPU, rank 1 on a device
# The real one, two ranks on one device.
ON_GPU = pytest.param(
    "cuda",
    marks=[
        _needs_extension,
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    ],
)
PROCESSES = [SHM, "dist", *ON_FAKE_CUDA, ON_GPU]
CPUS = [torch.device("cpu")] * 8
ALL = ["local", *PROCESSES]


@dataclass
class Ends:
    """One rank's part of a job."""

    rank: int
    transport: Transport
    senders: Mapping[str, Sender]
    receivers: Mapping[str, Receiver]
    world: World | None = None

    @property
    def shared(self) -> bool:
        """Whether tensors are passed by reference."""
        return self.transport.name == "local"


def send(ends: Ends, link: str, tag: int, value: Any, digest: int = 0) -> Generator[str | None, None, None]:
    """Send as soon as there is a slot."""
    deadline = time.monotonic() + PATIENCE
    while not ends.senders[link].send(tag, value, digest):
        ends.transport.check()
        assert time.monotonic() < deadline, f"no free slot on link {link}"
        yield WAIT


def receive(ends: Ends, link: str, tag: int) -> Generator[str | None, None, Message]:
    """The next message."""
    while ends.shared and not ends.receivers[link].ready():
        yield WAIT
    message = ends.receivers[link].recv(tag)
    assert message is not None
    return message


def run(
    transport: str,
    program: Program,
    *args: Any,
    ranks: int = 2,
    links: Sequence[Link] = PAIR,
    timeout: float = 60.0,
    store: str = "outside",
) -> list[Any]:
    """Each rank's result; fails if a rank raises or leaves something behind."""
    if transport == "local":
        return _interleaved(program, args, ranks, links)
    if transport in fake_cuda.KNOBS:
        fake_cuda.library()  # built once, and not by each rank
    outcomes = launch(rank_main, ranks, transport, program, args, links, timeout, timeout=3 * PATIENCE, store=store)
    return values(outcomes)


def rank_main(transport: str, program: Program, args: Sequence[Any], links: Sequence[Link], timeout: float) -> Any:
    """What each process runs."""
    leaks = fake_cuda.load(transport)
    if transport == "cuda":
        torch.set_default_device(devices(transport, int(os.environ["WORLD_SIZE"]))[int(os.environ["RANK"])])
    world = join(fake_cuda.real_name(transport), timeout)
    assert world is not None
    opened = open_transport(fake_cuda.real_name(transport), links, devices(transport, world.size), world)
    ends = Ends(world.rank, opened.transport, opened.senders, opened.receivers, world)
    steps = program(ends, *args)
    barriers = 0
    try:
        while True:
            if next(steps) == WAIT:
                time.sleep(0.0002)
            else:
                barriers += 1
                _barrier(ends, barriers)
    except StopIteration as end:
        result = end.value
    except BaseException as error:
        opened.transport.abort(error, f"rank {world.rank}, in its test program")
        raise
    opened.transport.close()
    del opened, ends, steps
    assert_nothing_left()
    assert leaks() == ""
    return result


def devices(transport: str, ranks: int) -> list[torch.device]:
    """One a rank: the GPUs in turn for the real CUDA transport, else the CPU."""
    if transport != "cuda":
        return CPUS[:ranks]
    return [torch.device("cuda", rank % torch.cuda.device_count()) for rank in range(ranks)]


def _barrier(ends: Ends, number: int) -> None:
    """Through the store, without a look at the job: who comes late must not meet the failure that a test makes next."""
    store = c10d._get_default_store()
    assert ends.world is not None
    key = f"test barrier {number}"
    if store.add(key, 1) == ends.world.size:
        store.set(f"{key} open", "")
    store.wait([f"{key} open"], timedelta(seconds=PATIENCE))


def assert_nothing_left() -> None:
    """No thread of ours, no child."""
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("pipekern")] == []
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        assert file.read() == ""


def _interleaved(program: Program, args: Sequence[Any], ranks: int, links: Sequence[Link]) -> list[Any]:
    transport, senders, receivers = open_transport("local", links, CPUS[:ranks], None)
    running = {
        rank: program(
            Ends(
                rank,
                transport,
                {link.name: senders[link.name] for link in links if link.source == rank},
                {link.name: receivers[link.name] for link in links if link.target == rank},
            ),
            *args,
        )
        for rank in range(ranks)
    }
    results: list[Any] = [None] * ranks
    at_barrier: set[int] = set()
    while running:
        for rank in sorted(running.keys() - at_barrier):
            try:
                if next(running[rank]) is None:
                    at_barrier.add(rank)
            except StopIteration as end:
                results[rank] = end.value
                del running[rank]
        if at_barrier >= running.keys():
            at_barrier.clear()
    transport.close()
    return results
