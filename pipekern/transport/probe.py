"""What the CUDA transport can do on this machine: every link between its GPUs, measured for about a second.

    python -m torch.distributed.run --standalone --nproc-per-node=2 -m pipekern.transport.probe

A rank a GPU, or two ranks on the only one. ``pipekern doctor`` runs it and shows what it prints: a row a link.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from pipekern.errors import TransportError
from pipekern.transport.base import Link, Receiver, Sender
from pipekern.transport.open import Opened, open_transport
from pipekern.transport.world import join

BYTES = 64 << 20  # of a message whose bandwidth is measured
LIMIT = 120.0  # seconds for all of it: starting the ranks takes most
_SLOTS = 4
_ROUNDS = 50  # there and back


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


def links_between(ranks: int) -> list[Link]:
    """A link from every rank to every other."""
    return [Link(f"{a}>{b}", a, b, _SLOTS) for a in range(ranks) for b in range(ranks) if a != b]


def measure(
    rank: int, links: Sequence[Link], opened: Opened, device: torch.device, seconds: float = 1.0
) -> list[Measured]:
    """Every link in turn, ``seconds`` in all; on rank 0 the rows of all links, elsewhere those that it sends on."""
    rows = []
    for link in links:
        back = f"{link.target}>{link.source}"
        if rank == link.source:
            found = _lead(opened.senders[link.name], opened.receivers[back], device, seconds / len(links))
            rows.append(Measured(link.name, _way(opened, link.name), *found))
        elif rank == link.target:
            _follow(opened.receivers[link.name], opened.senders[back])
    if rank:
        _send(opened.senders[f"{rank}>0"], 0, [list(row) for row in rows])
        return rows
    for other in range(1, max(link.source for link in links) + 1):
        rows += [Measured(*row) for row in _value(opened.receivers[f"{other}>0"], 0)]
    return rows


def _way(opened: Opened, link: str) -> str:
    ways: Mapping[str, str] = opened.transport.ways()  # type: ignore[attr-defined]  # the CUDA transport's
    return ways[link]


def _lead(sender: Sender, receiver: Receiver, device: torch.device, seconds: float) -> tuple[float, float]:
    small, large = torch.zeros(2, device=device), torch.zeros(BYTES, dtype=torch.uint8, device=device)
    for tag in range(_ROUNDS):
        if tag == _ROUNDS // 5:  # the first ones make slots
            start = time.perf_counter()
        _send(sender, tag, small)
        _value(receiver, tag).tolist()
    latency = 1e6 * (time.perf_counter() - start) / (_ROUNDS - _ROUNDS // 5) / 2
    _send(sender, 0, large)
    _value(receiver, 0)
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
        for tag in range(_SLOTS):
            _send(sender, tag, large)
        count += _SLOTS
        _value(receiver, 0)
    _send(sender, 0, None)
    return latency, count * BYTES / (time.perf_counter() - start)


def _follow(receiver: Receiver, sender: Sender) -> None:
    for tag in range(_ROUNDS):
        _send(sender, tag, _value(receiver, tag))
    _value(receiver, 0)[-1].item()
    _send(sender, 0, 1)
    while (value := _value(receiver, 0)) is not None:
        for tag in range(1, _SLOTS):
            value = _value(receiver, tag)
        value[-1].item()  # the last has arrived
        del value
        _send(sender, 0, 1)


def _send(sender: Sender, tag: int, value: Any) -> None:
    while not sender.send(tag, value, given=True):
        time.sleep(0)


def _value(receiver: Receiver, tag: int) -> Any:
    message = receiver.recv(tag)
    assert message is not None
    return message.value


def main() -> None:
    """One rank of the self-test."""
    world = join("cuda", LIMIT)
    assert world is not None, "start it with torchrun"
    device = torch.device("cuda", world.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    rank, links = world.rank, links_between(world.size)
    opened = open_transport("cuda", links, [device] * world.size, world)
    rows = measure(rank, links, opened, device)
    opened.transport.close()
    if rank == 0:
        print(json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
