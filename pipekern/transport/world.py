"""The processes of one job: who they are, what each says of itself, and their control board.

    world = join("auto", timeout=60.0)  # None: no launcher, this process has every rank
    rows = world.gather({"schedule": "1f1b"})

One job follows another in a process group, each in a world of its own.
"""

from __future__ import annotations

import atexit
import importlib
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from pipekern._version import __version__
from pipekern.errors import ConfigError, TransportTimeout
from pipekern.transport.agree import gather_json
from pipekern.transport.control import Control
from pipekern.transport.meeting import meet

_SHARED = ("boot", "net", "pid_namespace")  # what two processes share on one host: boot id and namespaces


class World:
    """This process among ``size`` ranks; :func:`join` makes it. ``identities``: :func:`identity` of each rank."""

    def __init__(self, timeout: float, check: Callable[[], object]):
        self.rank, self.size, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        self._gathers, self._check = 0, check
        # A connection of its own: whoever waits in the default one blocks it.
        store = c10d._get_default_store().clone()  # type: ignore[attr-defined]  # missing in torch's stubs
        name = meet(store, self.rank, self.size, timeout, check)
        self._store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]  # not re-exported
        in_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.control = Control(self._store, self.rank, self.size, timeout, None if in_launcher else 0)
        self.identities = self.gather(identity())
        here = self.identities[self.rank]
        peers = {rank: row for rank, row in enumerate(self.identities) if rank != self.rank and same_host(row, here)}
        self.control.start({rank: row["pid"] for rank, row in peers.items()})

    def gather(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """``row`` of every rank, by rank; collective. See :func:`~pipekern.transport.agree.gather_json`.

        Raises also what has happened to the job: ``PeerDied``, ``Aborted``.
        """
        self._gathers += 1
        name = f"gather/{self._gathers}"
        try:
            return gather_json(self._store, name, self.rank, self.size, row, self.timeout, self._left)
        except dist.DistError as error:
            self.control.store_lost(error)
            self.control.check()
            raise

    def _left(self, rank: int) -> bool:
        self._check()
        return self.control.left(rank)

    def abort(self, error: BaseException, where: str) -> None:
        """Make every rank of the job raise."""
        self.control.abort(error, where)

    def close(self) -> None:
        """Leave the job. The default process group stays, until the interpreter ends or someone destroys it."""
        self.control.leave()


def join(name: str, timeout: float, check: Callable[[], object] = lambda: None) -> World | None:
    """Meet the other ranks of a launcher; None where this process has every rank.

    That is so for the transports "local" and "null", and for "auto" and "cuda" with neither a process group nor the
    env:// variables RANK and WORLD_SIZE. A default process group is used if there is one, else made, over gloo.
    ``timeout`` in seconds bounds every wait for ranks that do not come; ``check`` is called meanwhile, and may raise
    what an earlier job of the same ranks has heard of them. Raises ``ConfigError``, ``TransportTimeout``.
    """
    if name in ("local", "null"):
        return None
    ready = dist.is_initialized()
    if not ready and not ("RANK" in os.environ and "WORLD_SIZE" in os.environ):
        if name in ("auto", "cuda"):
            return None
        raise ConfigError(
            f"transport={name!r} moves messages between processes, and this one was not started by a launcher; "
            "start it with torchrun, or use transport='auto'"
        )
    if not ready:
        try:
            _form_group(timedelta(seconds=timeout))
        except dist.DistError as error:
            size = os.environ["WORLD_SIZE"]
            raise TransportTimeout(
                f"the {size} ranks did not meet within {timeout:g} s: {error}. Start all of them together, with one "
                "MASTER_ADDR and MASTER_PORT, or give a longer timeout"
            ) from error
        atexit.register(_destroy_group)  # and not in close: another pipeline may use it by then
    return World(timeout, check)


def _form_group(timeout: timedelta) -> None:
    """The default process group, under a name of its own in the launcher's store: gloo finds peers by their rank."""
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    name = meet(store, rank, size, timeout.total_seconds())
    fresh = dist.PrefixStore(name, store)  # type: ignore[attr-defined]  # not re-exported
    dist.init_process_group("gloo", store=fresh, rank=rank, world_size=size, timeout=timeout)


def _destroy_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def identity() -> dict[str, Any]:
    """What a process tells the others of itself."""
    net, processes = os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/pid")
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    try:
        importlib.import_module("pipekern._C")
        extension = True
    except ImportError:
        extension = False
    return {
        "version": __version__,
        "pid": os.getpid(),
        "boot": boot,
        "net": net,
        "pid_namespace": processes,
        "extension": extension,
    }


def same_host(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two processes see each other's pids and sockets; host names say nothing in containers."""
    return all(row[key] == other[key] for key in _SHARED)
