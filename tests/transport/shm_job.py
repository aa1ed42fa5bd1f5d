"""Ranks that meet over the launcher's store and join a job in shared memory."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported at run time only

from pipekern.errors import TransportError
from pipekern.transport.base import Link
from pipekern.transport.shm import ShmReceiver, ShmSender, ShmTransport


def rank_of() -> int:
    return int(os.environ["RANK"])


def store() -> TCPStore:
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def barrier(name: str) -> None:
    meeting, world = store(), int(os.environ["WORLD_SIZE"])
    if meeting.add(f"{name}/count", 1) == world:
        meeting.set(f"{name}/all", "here")
    meeting.wait([f"{name}/all"])


def join(token: str, timeout: float = 60.0, name: str = "bound") -> ShmTransport:
    return ShmTransport(rank_of(), int(os.environ["WORLD_SIZE"]), token, timeout, lambda: barrier(name))


def neighbours(world: int, slots: int = 2) -> list[Link]:
    """A link up and a link down between every two neighbours."""
    up = [Link(f"{rank}>{rank + 1}", rank, rank + 1, slots) for rank in range(world - 1)]
    down = [Link(f"{rank + 1}>{rank}", rank + 1, rank, slots) for rank in range(world - 1)]
    return up + down


def alone(slots: int, token: str | None = None) -> tuple[ShmTransport, ShmSender, ShmReceiver]:
    """A job of one rank, and a link from it to itself."""
    transport = ShmTransport(0, 1, token or secrets.token_hex(16), 60.0, lambda: None)
    senders, receivers = transport.open([Link("0>0", 0, 0, slots)])
    return transport, senders["0>0"], receivers["0>0"]


def receive(receiver: ShmReceiver, tag: int) -> Any:
    message = receiver.recv(tag)
    assert message is not None
    return message.value


def failure_of(call: Callable[[], object]) -> tuple[str, int, str, float]:
    """Class, rank, text and time of what ``call`` raises."""
    try:
        call()
    except TransportError as error:
        return type(error).__name__, error.rank, str(error), time.monotonic()
    raise AssertionError("nothing was raised")


def no_data_follows(
    transport: ShmTransport, senders: Mapping[str, ShmSender], receivers: Mapping[str, ShmReceiver]
) -> None:
    """After a failure every call raises, whatever has arrived."""
    for call in (
        transport.check,
        *(lambda s=s: s.send(0, torch.zeros(1)) for s in senders.values()),
        *(lambda s=s: s.send(0, (1, torch.zeros(2, 2).T)) for s in senders.values()),
        *(lambda r=r: r.recv(0, wait=0.0) for r in receivers.values()),
        *(lambda r=r: r.ready() for r in receivers.values()),
    ):
        with pytest.raises(TransportError):
            call()
