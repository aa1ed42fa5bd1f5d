"""What ranks write on the board of a job, which lies in the c10d store."""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple, Protocol

from pipekern.errors import Aborted, PeerDied, PeerFrozen, TransportError, TransportTimeout
from pipekern.transport.agree import Store

KINDS: dict[str, type[TransportError]] = {
    "died": PeerDied,
    "frozen": PeerFrozen,
    "timeout": TransportTimeout,
    "error": Aborted,
}
NO_ABORT = "-"  # the abort word, before


class Board(Store, Protocol):
    """What is used of a ``torch.distributed.Store``."""

    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def compare_set(self, key: str, expected: str, value: str, /) -> bytes: ...
    def set_timeout(self, timeout: timedelta, /) -> None: ...


class Failure(NamedTuple):
    """Why the job has ended: ``kind`` is a key of ``KINDS``, ``rank`` the one at fault or -1."""

    kind: str
    rank: int
    text: str


class State(NamedTuple):
    """What a rank tells the others."""

    beat: int = 0
    waited: float = 0.0  # seconds without any message moving, 0 while it computes
    what: str = ""  # what it waits for
    left: bool = False  # it has closed its transport
    failed: bool = False  # it knows of the failure


class Life(NamedTuple):
    """The last proof that a peer runs."""

    beat: int
    cpu_ticks: int
    at: float  # this process's monotonic clock
