"""How ranks on any nodes know of each other's failures: a board in the c10d store, read by a thread on each rank.

Every 0.1 s a rank writes its state (a beat, how long it has waited and for what) and reads the abort word, the first
failure that anyone has written. A process on the same host tells its end by pidfd, at once; elsewhere the loss of a
connection tells (:meth:`Control.lost`). What is judged:

* died: a process has ended, or a connection broke, and neither ``left`` nor the abort word explains it;
* frozen: while this rank waits, a process on this host has been stopped for an eighth of ``timeout``, at least 1 s, or
  a peer has neither beaten nor, on this host, used CPU time for all of it;
* timeout: every rank that has not left says that it has waited for ``timeout`` seconds;
* a live peer that computes is waited for, with a log line each 30 s.

Beats come from a Python thread, and cease while C++ code keeps the GIL: so no shorter silence counts, and a peer on
another host looks frozen after ``timeout``.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from datetime import timedelta

from torch.distributed import DistError

from pipekern.errors import TransportError
from pipekern.transport.agree import SLICE
from pipekern.transport.board import KINDS, NO_ABORT, Board, Failure, Life, State
from pipekern.transport.processes import Processes

_LOG = logging.getLogger("pipekern.transport")
_LOG_EVERY = 30.0  # seconds between lines about a peer that is waited for
_GAP = 1.0  # seconds without a try after which a rank no longer counts as waiting
_FREEZE_SHARE = 8  # of the timeout
_LINGER = 5.0  # seconds that the store outlives a failure for ranks that have not read it: stopped ones never will
_TEXT_LIMIT = 32768  # characters of a traceback that travel


class Control:
    """``rank``'s view of the job. ``host`` is the rank whose process holds the store, None for a launcher's."""

    def __init__(self, board: Board, rank: int, ranks: int, timeout: float, host: int | None):
        self.rank, self.ranks, self.timeout, self.host = rank, ranks, timeout, host
        self.failure: Failure | None = None
        self._board: Board | None = board
        board.set_timeout(timedelta(seconds=max(timeout, 1.0)))
        self._pid = os.getpid()
        self._mine = State()
        self._states = [State()] * ranks
        self._life = [Life(0, 0, time.monotonic())] * ranks
        self._stride = 1 + ranks // 64  # rounds between two looks at all states
        self._processes = Processes({})
        self._freeze = min(timeout, max(timeout / _FREEZE_SHARE, 1.0))
        self._stopped: dict[int, int] = {}  # in how many rounds, which do not go on while this process is stopped too
        self._answered = time.monotonic()  # the store, last
        self._waiting = (0.0, 0.0, "")  # first and last try in vain since a message moved, and for what
        self._logged = 0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pipekern control", daemon=True)
        if rank == 0:
            board.set("abort", NO_ABORT)
        self._publish(board)

    def start(self, pids: Mapping[int, int]) -> None:
        """Begin, once every rank has made its Control. ``pids`` are the peers on this host, by rank."""
        self._processes = Processes(pids)
        self._thread.start()

    def left(self, rank: int) -> bool:
        """Whether ``rank`` had closed its transport 0.1 s ago; raises if the job has failed."""
        self.check()
        return self._states[rank].left

    # -- the program's side

    def check(self) -> None:
        """Raise if the job has failed or this rank has left it."""
        if self.failure is not None:
            waited, what = self._waited()
            seen = f"\n  rank {self.rank} had waited {waited:.1f} s for {what}" if waited else ""
            raise KINDS[self.failure.kind](self.failure.text + seen, self.failure.rank)
        if self._left.is_set():
            raise TransportError(f"rank {self.rank} has closed this transport; open a new one")

    def blocked(self, what: str) -> None:
        """Note a try in vain: at least one a second while this rank waits for ``what``."""
        now = time.monotonic()
        first, last, _ = self._waiting
        self._waiting = (first if now - last < _GAP else now, now, what)
        if min(now - first, now - self._answered) > self._freeze and now - last < _GAP:
            self._judge_store(now - self._answered)

    def _judge_store(self, silence: float) -> None:
        """What the thread cannot do: a frozen store keeps it (seen in torch 2.13, with any timeout of the store)."""
        host = self.host
        stopped = host is not None and self._processes.stopped(host)
        if self.failure is None and (stopped or silence > self.timeout):
            self._board = None
            who = "the launcher" if host is None else f"rank {host}"
            text = f"{who}, which holds the store, has not answered for {silence:.1f} s (timeout {self.timeout:g} s)"
            self.failure = Failure("error", -1, text) if host is None else Failure("frozen", host, text)

    def moved(self) -> None:
        """Note that a message moved."""
        self._waiting = (0.0, 0.0, "")

    def _waited(self) -> tuple[float, str]:
        first, last, what = self._waiting
        return (last - first, what) if time.monotonic() - last < _GAP else (0.0, "")

    def abort(self, error: BaseException, where: str) -> None:
        """Make every rank raise: what this one did if it judges a rank or all, else ``Aborted`` with the traceback."""
        for kind, cls in KINDS.items():
            if type(error) is cls and isinstance(error, TransportError) and kind != "error":
                self.fail(kind, error.rank, str(error))
                return
        report = "".join(traceback.format_exception(type(error), error, error.__traceback__))[-_TEXT_LIMIT:]
        self.fail("error", self.rank, f"rank {self.rank} failed at {where}\n{report}")

    def lost(self, rank: int, how: str) -> None:
        """Judge the loss of ``rank``: its death, unless the job had failed before or ``rank`` has left."""
        if self.failure is not None or self._board is None or self._left.is_set():
            return
        try:
            self._read(self._board, [rank])
        except DistError as error:
            self.store_lost(error)
        if not self._states[rank].left:
            self.fail(
                "died",
                rank,
                f"rank {rank} has died: {how}. Read what rank {rank} printed last; after signal 9, look into the "
                "kernel's log for the out-of-memory killer",
            )

    def fail(self, kind: str, rank: int, text: str) -> None:
        """Write a failure for every rank to see, unless another came first; then that one counts here too."""
        if self.failure is not None:
            return
        mine = Failure(kind, rank, text)
        try:
            first = self._board.compare_set("abort", NO_ABORT, json.dumps(mine)) if self._board else b""
        except DistError:
            first = b""
        self.failure = Failure(*json.loads(first)) if first else mine

    def store_lost(self, error: DistError) -> None:
        """The store does not answer: its host has left, died or frozen, or the launcher has ended."""
        self._board = None
        host = self.host
        if self.failure is not None or (host is not None and self._states[host].left):
            return
        if host is None:
            self.failure = Failure("error", -1, f"the launcher's store is gone, so the launcher has ended: {error}")
        elif "timeout" in str(error).lower():
            text = f"rank {host}, which holds the store, does not answer: {error}"
            self.failure = Failure("frozen", host, text)
        else:
            text = f"rank {host} has died, and the store with it: {error}. Read what rank {host} printed last"
            self.failure = Failure("died", host, text)

    def leave(self) -> None:
        """Say that this rank has closed, and stop. Does nothing in a forked child."""
        if self._left.is_set() or os.getpid() != self._pid:
            return
        self._left.set()
        if self._thread.is_alive() and self._board is not None:  # without it, the thread ends when it can
            self._thread.join()
        self._mine = self._mine._replace(left=True, failed=self.failure is not None)
        if self._board is not None:
            try:
                self._publish(self._board)
                if self.host == self.rank:
                    self._linger(self._board)
            except DistError as error:
                _LOG.debug("the store went away while rank %d was closing: %s", self.rank, error)
        self._processes.close()

    # -- the thread's side

    def _run(self) -> None:
        while not self._left.wait(SLICE) and self._board is not None:
            try:
                self._round(self._board)
            except DistError as error:
                self.store_lost(error)
            if self._mine.failed:
                return

    def _round(self, board: Board) -> None:
        waited, what = self._waited()
        self._mine = State(self._mine.beat + 1, waited, what, failed=self.failure is not None)
        self._publish(board)
        if self.failure is not None:
            return
        # In a large job all states only now and then, which keeps the store's load linear in the ranks.
        self._read(board, range(self.ranks) if self._mine.beat % self._stride == 0 else [])
        before = set(self._processes.ended)
        self._processes.update()
        for rank in self._processes.ended - before:
            self.lost(rank, f"{self._processes.describe(rank)} has ended")
        if not waited:
            self._stopped.clear()
        elif self.failure is None:
            self._judge_wait(waited, what)

    def _publish(self, board: Board) -> None:
        board.set(f"state/{self.rank}", json.dumps(self._mine))

    def _read(self, board: Board, ranks: Iterable[int]) -> None:
        """Fetch the abort word and the states of ``ranks``."""
        ranks = list(ranks)
        word, *rows = board.multi_get(["abort", *(f"state/{rank}" for rank in ranks)])
        self._answered = now = time.monotonic()
        for rank, row in zip(ranks, rows, strict=True):
            state, life = State(*json.loads(row)), self._life[rank]
            ticks = self._processes.cpu_ticks(rank) if state.beat == life.beat else life.cpu_ticks
            if (state.beat, ticks) != (life.beat, life.cpu_ticks):
                self._life[rank] = Life(state.beat, ticks, now)
            self._states[rank] = state
        if self.failure is None and word.decode() != NO_ABORT:
            self.failure = Failure(*json.loads(word))

    def _judge_wait(self, waited: float, what: str) -> None:
        others = [rank for rank in range(self.ranks) if rank != self.rank and not self._states[rank].left]
        silence = {rank: time.monotonic() - self._life[rank].at for rank in others}
        self._stopped = {rank: self._stopped.get(rank, 0) + 1 for rank in others if self._processes.stopped(rank)}
        stopped = [rank for rank, rounds in self._stopped.items() if rounds * SLICE > self._freeze]
        silent = [rank for rank in others if waited > self.timeout and silence[rank] > self.timeout]
        if stopped or silent:
            rank = (stopped or silent)[0]
            sign = f"is stopped ({self._processes.describe(rank)})" if stopped else "lives but has not moved"
            self.fail(
                "frozen",
                rank,
                f"rank {rank} {sign}, for {silence[rank]:.1f} s (timeout {self.timeout:g} s), while rank {self.rank} "
                f"waits for {what}; see what stopped it, or give a longer timeout",
            )
        elif waited > self.timeout and all(self._states[rank].waited > self.timeout for rank in others):
            waits = [(self.rank, what), *((rank, self._states[rank].what) for rank in others)]
            self.fail(
                "timeout",
                -1,
                f"every rank has waited for {self.timeout:g} s, so nobody can go on: "
                f"{'; '.join(f'rank {rank} for {awaited}' for rank, awaited in waits)}. They run different programs",
            )
        elif waited > _LOG_EVERY * (self._logged + 1):
            self._logged += 1
            _LOG.warning("rank %d has waited %.0f s for %s; the other ranks are alive", self.rank, waited, what)
        elif waited < _LOG_EVERY:
            self._logged = 0

    def _linger(self, board: Board) -> None:
        """Keep the store until each other rank knows that this one left, or why the job failed, or has itself gone."""
        before = list(self._states)
        deadline = time.monotonic() + (self.timeout if self.failure is None else min(self.timeout, _LINGER))
        unaware = [rank for rank in range(self.ranks) if rank != self.rank]
        while unaware and time.monotonic() < deadline:
            self._read(board, unaware)
            self._processes.update()
            unaware = [
                rank
                for rank in unaware
                if rank not in self._processes.ended
                and not (self._states[rank].left or self._states[rank].failed)
                and (self.failure is not None or self._states[rank].beat < before[rank].beat + self._stride + 1)
            ]
            time.sleep(SLICE / 10)
