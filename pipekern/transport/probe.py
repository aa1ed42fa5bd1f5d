"""How fast links between CUDA devices are, measured for about a second.

    python -m torch.distributed.run --standalone --nproc-per-node=2 -m pipekern.transport.probe

measures every link between the GPUs of this machine, a rank a GPU, or two ranks on the only one. ``pipekern doctor``
runs it and shows what it prints: a row a link.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from pipekern.errors import TransportError
from pipekern.transport.base import Link, Receiver, Sender
from pipekern.transport.open import Opened, cuda_transport
from pipekern.transport.world import World, join

BYTES = 64 << 20  # at most, of a message whose bandwidth is measured
_LEAST_BYTES = 1 << 20
LIMIT = 120.0  # seconds for all of it: starting the ranks takes most
_SLOTS = 4
_ROUNDS = 50  # there and back

Steps = Generator[None, None, Any]


class Measured(NamedTuple):
    """One link: its way, microseconds of a small message, and bytes a second of large ones."""

    link: str
    way: str
    latency: float
    bandwidth: float


def run(gpus: int) -> list[Measured]:
    """Start a rank a GPU, two on the only one, and measure. Raises ``TransportError`` with what a rank printed."""
    ranks = max(gpus, 2)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", __name__]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise TransportError(f"the links' self-test did not end within {LIMIT:g} s") from error
    if done.returncode:
        raise TransportError(f"the links' self-test failed: {done.stderr[-2000:]}")
    return [Measured(*row) for row in json.loads(done.stdout.splitlines()[-1])]


def between(
    pairs: Mapping[tuple[int, int], float], devices: Sequence[torch.device], world: World | None, seconds: float
) -> list[Measured]:
    """A row for each of ``pairs`` of ranks, with messages of about so many bytes; the same on every rank; collective.

    Each pair is also there the other way round. They share ``seconds``, and are measured at once where they share no
    rank. The links are of a transport of their own, which is gone afterwards with all of its memory.
    """
    links = [Link(f"{a}>{b}", a, b, _SLOTS) for a, b in pairs]
    sizes = [min(BYTES, max(_LEAST_BYTES, int(size))) for size in pairs.values()]
    rank = None if world is None else world.rank
    transport = cuda_transport(devices, world)
    try:
        opened = Opened(transport, *transport.open(links))
        rows = measure(rank, links, opened, devices, sizes, seconds)
    except BaseException as error:
        transport.abort(error, f"rank {rank or 0}, measuring links")
        raise
    finally:
        transport.close()
    gathered = [rows] if world is None else [row["links"] for row in world.gather({"links": rows})]
    return [Measured(*row) for rows in gathered for row in rows]


def measure(
    rank: int | None,
    links: Sequence[Link],
    opened: Opened,
    devices: Sequence[torch.device],
    sizes: Sequence[int],
    seconds: float,
) -> list[Measured]:
    """Every link in turn, ``seconds`` in all, with large messages of ``sizes`` bytes: the rows of those that this
    process sends on. ``rank`` None: all of them.
    """
    rows = []
    for link, size in zip(links, sizes, strict=True):
        back = f"{link.target}>{link.source}"
        check, leads, follows = opened.transport.check, rank in (None, link.source), rank in (None, link.target)
        sides: list[Steps] = []
        if leads:
            end = _End(opened.senders[link.name], opened.receivers[back], devices[link.source], rank is None)
            sides.append(_lead(end, size, seconds / len(links)))
        if follows:
            end = _End(opened.senders[back], opened.receivers[link.name], devices[link.target], rank is None)
            sides.append(_follow(end))
        found = _run(sides, check)
        if leads:
            rows.append(Measured(link.name, _way(opened, link.name), *found))
    return rows


def _way(opened: Opened, link: str) -> str:
    ways: Mapping[str, str] = opened.transport.ways()  # type: ignore[attr-defined]  # the CUDA transport's
    return ways[link]


class _End(NamedTuple):
    """One side of a link and of the one back. ``alone``: the other side is in this thread, and runs at each yield."""

    sender: Sender
    receiver: Receiver
    device: torch.device
    alone: bool

    def send(self, tag: int, value: Any) -> Steps:
        while not self.sender.send(tag, value, given=True):
            yield

    def value(self, tag: int) -> Steps:
        while self.alone and not self.receiver.ready():
            yield
        message = self.receiver.recv(tag)
        assert message is not None
        return message.value


def _run(sides: Sequence[Steps], check: Callable[[], None]) -> Any:
    """Run all to their ends, in turn; what the first returns."""
    results: dict[int, Any] = {}
    while len(results) < len(sides):
        for index, side in enumerate(sides):
            if index not in results:
                try:
                    next(side)
                except StopIteration as end:
                    results[index] = end.value
        check()
        time.sleep(0)
    return results.get(0)


def _lead(end: _End, size: int, seconds: float) -> Steps:
    small = torch.zeros(2, device=end.device)
    large = torch.zeros(size, dtype=torch.uint8, device=end.device)
    for tag in range(_ROUNDS):
        if tag == _ROUNDS // 5:  # the first ones make slots
            start = time.perf_counter()
        yield from end.send(tag, small)
        (yield from end.value(tag)).tolist()
    latency = 1e6 * (time.perf_counter() - start) / (_ROUNDS - _ROUNDS // 5) / 2
    yield from end.send(0, large)
    yield from end.value(0)
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
        for tag in range(_SLOTS):
            yield from end.send(tag, large)
        count += _SLOTS
        yield from end.value(0)
    yield from end.send(0, None)
    return latency, count * size / (time.perf_counter() - start)


def _follow(end: _End) -> Steps:
    for tag in range(_ROUNDS):
        yield from end.send(tag, (yield from end.value(tag)))
    (yield from end.value(0))[-1].item()
    yield from end.send(0, 1)
    while (value := (yield from end.value(0))) is not None:
        for tag in range(1, _SLOTS):
            value = yield from end.value(tag)
        value[-1].item()  # the last has arrived
        del value
        yield from end.send(0, 1)


def main() -> None:
    """One rank of the self-test."""
    world = join("cuda", LIMIT)
    assert world is not None, "start it with torchrun"
    device = torch.device("cuda", world.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    ranks = range(world.size)
    rows = between({(a, b): BYTES for a in ranks for b in ranks if a != b}, [device] * world.size, world, 1.0)
    world.close()
    if world.rank == 0:
        print(json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
