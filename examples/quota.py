"""A share of its core for a process: it is stopped and continued in turn, a few milliseconds each.

    with Quota(slower=2.0):
        ...                                         # everything this process does takes twice as long

What a CPU quota of a control group does, in shorter turns and without the right to make one. It needs Linux, and no
privilege.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import TracebackType

LONGEST = 0.1  # seconds of a stop, whatever this process itself had to wait for its turn
PERIOD = 0.004  # seconds; as short as sleeping is exact, for work between two messages shall meet several


class Quota:
    """Slows this process down by the factor ``slower`` while the context lasts."""

    def __init__(self, slower: float):
        self._command = [sys.executable, __file__, str(slower)]

    def __enter__(self) -> None:
        self._keeper = subprocess.Popen(self._command, stdout=subprocess.PIPE)
        assert self._keeper.stdout is not None
        self._keeper.stdout.readline()  # it has begun

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._keeper.terminate()
        self._keeper.communicate()


def keep(pid: int, slower: float) -> None:
    """Stop and continue the process that has started this one, until it has ended."""
    ran = stopped = 0.0
    while os.getppid() == pid:
        start = time.perf_counter()
        time.sleep(PERIOD / slower)
        os.kill(pid, signal.SIGSTOP)
        middle = time.perf_counter()
        ran += middle - start
        owed = ran * (slower - 1) - stopped  # where a sleep was too long, the next ones make up for it, bit by bit
        time.sleep(min(max(0.0, owed), LONGEST))
        os.kill(pid, signal.SIGCONT)
        stopped += time.perf_counter() - middle


def main() -> None:
    """The process that keeps the quota of its parent."""
    pid, slower = os.getppid(), float(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    print("begun", flush=True)
    try:
        keep(pid, slower)
    finally:
        if os.getppid() == pid:
            os.kill(pid, signal.SIGCONT)


if __name__ == "__main__":
    main()
