"""Messages over torch.distributed, for ranks on different nodes and where the C++ extension is not built.

Every link has a process group of its own, so that no link waits for another, whatever the group's backend. The
receiving rank reads ahead of the program in a thread a link, since works of gloo cannot be polled (seen in torch 2.13:
``is_completed`` stays False until ``wait``). A received tensor is a view of the block that it arrived in; when the last
view dies, a token goes back over the same group and returns the slot's credit. So at most ``slots`` messages exist on
a link, as with shared memory.
"""

from __future__ import annotations

import atexit
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from pipekern.errors import ConfigError, TransportError
from pipekern.transport.agree import SLICE, disagreements
from pipekern.transport.base import Link, Receiver, Sender
from pipekern.transport.ends import CREDIT, DistReceiver, DistSender
from pipekern.transport.wire import Wire
from pipekern.transport.world import World


class DistTransport:
    """``world``'s links over one gloo group each."""

    name = "dist"

    def __init__(self, world: World):
        self.world, self.control = world, world.control
        self._groups: list[dist.ProcessGroup] = []
        self._ends: list[DistSender | DistReceiver] = []
        self._freed: queue.SimpleQueue[DistReceiver | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_credits, name="pipekern credits", daemon=True)
        self._pid = os.getpid()
        self._closed = False

    def open(self, links: Sequence[Link]) -> tuple[dict[str, Sender], dict[str, Receiver]]:
        """This rank's ends of ``links``; collective. Raises ``ConfigError``, ``TransportError``, ``PeerDied``."""
        for link in links:
            if link.source == link.target or not {link.source, link.target} <= set(range(self.world.size)):
                raise ConfigError(f"{link} does not join two ranks of 0 to {self.world.size - 1}")
        # Making a group blocks until its other rank comes, so every rank says first that it will make the same ones.
        faults = disagreements(self.world.gather({"links": [list(link) for link in links]}))
        if faults:
            raise ConfigError(f"the ranks open different links: {'; '.join(faults)}")
        senders: dict[str, Sender] = {}
        receivers: dict[str, Receiver] = {}
        for link in links:
            wire = self._connect(link)
            if wire is None:
                continue
            if self.world.rank == link.source:
                sender = senders[link.name] = DistSender(self.control, link, wire)
                self._ends.append(sender)
            else:
                receiver = receivers[link.name] = DistReceiver(self.control, link, wire, self._freed)
                self._ends.append(receiver)
        atexit.register(self._exit)
        for thread in (self._writer, *(end.thread for end in self._ends)):
            thread.start()
        return senders, receivers

    def _connect(self, link: Link) -> Wire | None:
        timeout = timedelta(seconds=self.world.timeout)
        pair = sorted((link.source, link.target))
        try:
            group = dist.new_group(pair, timeout=timeout, backend="gloo", group_desc=f"pipekern {link.name}")
        except RuntimeError as error:
            self.control.check()
            peer = link.source + link.target - self.world.rank
            raise TransportError(
                f"rank {self.world.rank} cannot reach rank {peer} for {link}: {error}", peer
            ) from error
        if self.world.rank not in pair:
            return None
        self._groups.append(group)
        return Wire(group)

    def check(self) -> None:
        """Raise if the job has failed or this transport is closed."""
        self.control.check()

    def abort(self, error: BaseException, where: str) -> None:
        """Make every rank raise what this one did."""
        self.control.abort(error, where)

    def close(self) -> None:
        """End every link with its other side, or break it after a failure; ends all threads and groups.

        Waits for a live peer for ``timeout`` seconds at most. Does nothing in a forked child.
        """
        if self._closed or os.getpid() != self._pid:
            return
        if self.control.failure is None:
            for end in self._ends:
                end.finish()
            deadline = time.monotonic() + self.world.timeout
            while self._running() and self.control.failure is None and time.monotonic() < deadline:
                self._running()[0].thread.join(SLICE)
        self._closed = True
        atexit.unregister(self._exit)
        self.control.leave()
        for end in self._running():
            end.wire.snap()
        self._freed.put(None)
        for thread in (self._writer, *(end.thread for end in self._ends)):
            if thread.ident is not None:
                thread.join(self.world.timeout)
        for group in self._groups:
            with suppress(ValueError, AssertionError):  # the user has destroyed the process groups
                dist.destroy_process_group(group)
        self._groups.clear()
        self._ends.clear()
        self.world.close()

    def _exit(self) -> None:
        """At the interpreter's exit: an exception that ended the program is every rank's failure."""
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if error is not None:
            self.abort(error, f"rank {self.world.rank}, outside of the pipeline")
        self.close()

    def _running(self) -> list[DistSender | DistReceiver]:
        return [end for end in self._ends if end.thread.is_alive()]

    def _write_credits(self) -> None:
        # In a thread, because a block may die anywhere, also in the middle of a call into torch.distributed.
        while (receiver := self._freed.get()) is not None:
            receiver.post(CREDIT)
