"""Watching other processes of this host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from pipekern.transport.processes import Processes


def test_golden() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        watched = Processes({3: child.pid})
        watched.update()
        assert watched.ended == set()
        assert watched.describe(3) == f"process {child.pid}" and watched.describe(0) == ""
        before = watched.cpu_ticks(3)
        while watched.cpu_ticks(3) == before:  # it runs, so this ends
            time.sleep(0.01)
        assert not watched.stopped(3) and not watched.stopped(0)
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        assert watched.stopped(3)
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        watched.update()  # seen before anyone has reaped it
        assert watched.ended == {3}
    assert watched.cpu_ticks(3) == watched.cpu_ticks(0) == 0
    watched.close()


def test_a_process_that_had_gone_before_counts_as_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert Processes({1: child.pid}).ended == {1}
