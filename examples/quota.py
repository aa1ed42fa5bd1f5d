"""A process that gets a share of its core: stopped and continued in turn, a few milliseconds each.

    with Quota(os.getpid(), slower=2.0):
        ...                                         # everything this process does takes twice as long

What a CPU quota of a control group does, in shorter turns and without the right to make one. It needs Linux, and no
privilege for a process of one's own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import TracebackType

PERIOD = 0.004  # seconds; as short as sleeping is exact, for work between two messages shall meet several


class Quota:
    """Slows process ``pid`` down by the factor ``slower`` while the context lasts."""

    def __init__(self, pid: int, slower: float):
        self._command = [sys.executable, __file__, str(pid), str(slower)]

    def __enter__(self) -> None:
        self._keeper = subprocess.Popen(self._command, stdout=subprocess.PIPE)
        assert self._keeper.stdout is not None
        self._keeper.stdout.readline()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._keeper.terminate()
        self._keeper.communicate()


def keep(pid: int, slower: float) -> None:
    """Stop and continue ``pid`` until it has ended, or this process is asked to end."""
    ran = stopped = 0.0
    while True:
        start = time.perf_counter()
        time.sleep(PERIOD / slower)
        os.kill(pid, signal.SIGSTOP)
        middle = time.perf_counter()
        ran += middle - start
        time.sleep(max(0.0, ran * (slower - 1) - stopped))  # where a sleep was too long, the next ones make up for it
        os.kill(pid, signal.SIGCONT)
        stopped += time.perf_counter() - middle


def main() -> None:
    """The process that keeps the quota of another."""
    pid, slower = int(sys.argv[1]), float(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    print("ready", flush=True)
    try:
        keep(pid, slower)
    except ProcessLookupError:
        pass
    finally:
        os.kill(pid, signal.SIGCONT)


if __name__ == "__main__":
    main()
