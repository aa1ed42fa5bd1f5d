"""A name that the ranks of a job agree on, and that no earlier job had.

A launcher's store may outlive its processes. torchrun's does: after a restart it holds what the ranks before have
written (seen in torch 2.13), and whoever reads a key by rank too early is led to a process that is dead. So a rank
reads only what answers a question of its own: it asks under a random name, rank 0 answers whatever it finds asked, and
has reached all when each of them has confirmed the new name under that name.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from pipekern.errors import TransportTimeout
from pipekern.transport.agree import SLICE, Store, named


def meet(store: Store, rank: int, ranks: int, timeout: float, check: Callable[[], object] = lambda: None) -> str:
    """The name; collective. ``store`` may hold anything of earlier meetings, also of those that were broken off.
    ``check`` is called while it waits, and may raise.

    Raises ``TransportTimeout`` naming the ranks that have not come after ``timeout`` seconds.
    """
    own = uuid.uuid4().hex
    answer = f"pipekern/answer/{own}"
    if rank:
        store.set(f"pipekern/asked/{rank}", own)

    def unseen() -> list[int]:
        if rank:
            return [] if store.check([answer]) else [0]
        return [other for other in range(1, ranks) if not _reached(store, own, other)]

    deadline, pause = time.monotonic() + timeout, 0.0005
    while missing := unseen():
        check()
        if time.monotonic() > deadline:
            raise TransportTimeout(
                f"the {ranks} ranks did not meet within {timeout:g} s: rank {rank} has not seen {named(missing)}. "
                "Start all of them together, with one MASTER_ADDR and MASTER_PORT, or give a longer timeout",
                missing[0],
            )
        time.sleep(pause)
        pause = min(2 * pause, SLICE)
    if rank == 0:
        return own
    name = store.get(answer).decode()
    store.set(f"pipekern/{name}/has/{rank}", "")
    return name


def _reached(store: Store, name: str, rank: int) -> bool:
    """Whether ``rank`` has ``name``; if not, that is the answer to what it has asked last, in this job or another."""
    if store.check([f"pipekern/{name}/has/{rank}"]):
        return True
    if store.check([f"pipekern/asked/{rank}"]):
        store.set(f"pipekern/answer/{store.get(f'pipekern/asked/{rank}').decode()}", name)
    return False
