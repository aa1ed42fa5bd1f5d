"""The processes of other ranks on this host: whether they have ended, and whether they run."""

from __future__ import annotations

import os
import select
from collections.abc import Mapping


class Processes:
    """Watches by pidfd, which tells a process's end at once, also where a forked child still holds its sockets."""

    def __init__(self, pids: Mapping[int, int]):
        """``pids`` by rank."""
        self._pids = dict(pids)
        self._descriptors: dict[int, int] = {}  # to the rank
        self._poll = select.poll()
        self.ended: set[int] = set()  # ranks
        for rank, pid in pids.items():
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                self.ended.add(rank)
                continue
            self._descriptors[descriptor] = rank
            self._poll.register(descriptor, select.POLLIN)

    def update(self) -> None:
        """Look for processes that have ended; never waits."""
        for descriptor, _ in self._poll.poll(0):
            self._poll.unregister(descriptor)
            self.ended.add(self._descriptors[descriptor])

    def describe(self, rank: int) -> str:
        """``process 1234``, or nothing for a rank elsewhere."""
        return f"process {self._pids[rank]}" if rank in self._pids else ""

    def cpu_ticks(self, rank: int) -> int:
        """Clock ticks that ``rank`` has used; 0 for one that has gone or is elsewhere."""
        return sum(map(int, self._stat(rank)[11:13]))

    def stopped(self, rank: int) -> bool:
        """Whether ``rank`` is stopped by a signal, and not by a debugger; False for one that is elsewhere."""
        return self._stat(rank)[:1] == ["T"]

    def _stat(self, rank: int) -> list[str]:
        """The fields of /proc/PID/stat from the state on; none for one that has gone or is elsewhere."""
        if rank not in self._pids:
            return []
        try:
            with open(f"/proc/{self._pids[rank]}/stat") as file:
                return file.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return []

    def close(self) -> None:
        """Give the descriptors back."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
