"""Which transport a job uses, and its links.

    world = join("auto", timeout=60.0)
    transport, senders, receivers = open_transport("auto", links, 2, world)

Both are collective: every rank of the job calls them, with the same links.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from pipekern.errors import ConfigError
from pipekern.transport.base import Link, Receiver, Sender, Transport
from pipekern.transport.dist import DistTransport
from pipekern.transport.local import LocalTransport
from pipekern.transport.null import NullTransport
from pipekern.transport.world import World, same_host

NAMES = ("auto", "shm", "dist", "local", "null")


class Opened(NamedTuple):
    """A transport and this process's ends of its links, by link name."""

    transport: Transport
    senders: Mapping[str, Sender]
    receivers: Mapping[str, Receiver]


def open_transport(name: str, links: Sequence[Link], ranks: int, world: World | None) -> Opened:
    """Open ``links``, the same list on every rank; collective. ``world`` is what ``join(name, timeout)`` returned.

    "auto" is "local" where this process has every rank, "shm" where all ranks share a host and have the C++ extension,
    else "dist". The transport takes the world over: closing it closes the world. Raises ``ConfigError``, and what
    happens to the job meanwhile: if one rank fails, all do.
    """
    chosen = choose(name, world)
    if world is not None and chosen in ("shm", "dist"):
        try:
            return _open_shm(world, links) if chosen == "shm" else _open_dist(world, links)
        except BaseException as error:
            world.abort(error, f"rank {world.rank}, opening the {chosen} transport")
            world.close()
            raise
    if world is not None:
        world.close()
    transport: Transport = NullTransport() if chosen == "null" else LocalTransport(ranks)
    return Opened(transport, *transport.open(links))


def _open_dist(world: World, links: Sequence[Link]) -> Opened:
    transport = DistTransport(world)
    try:
        return Opened(transport, *transport.open(links))
    except BaseException as error:
        transport.abort(error, f"rank {world.rank}, opening links over gloo")
        transport.close()
        raise


def _open_shm(world: World, links: Sequence[Link]) -> Opened:
    from pipekern.transport.shm import ShmTransport  # only here: it needs the C++ extension

    token = world.gather({"token": secrets.token_hex(16)})[0]["token"]
    transport = ShmTransport(world.rank, world.size, token, world.timeout, lambda: world.gather({}))
    opened = Opened(transport, *transport.open(links))
    world.gather({})
    world.close()  # every rank has its links: from here on the transport itself watches
    return opened


def choose(name: str, world: World | None) -> str:
    """The transport that ``name`` stands for. Raises ``ConfigError`` where it cannot be had."""
    if name not in NAMES:
        near = get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"transport={name!r} is not one of {', '.join(map(repr, NAMES))}{hint}")
    if name == "auto" and (world is None or world.size == 1):
        return "local"
    if world is None:
        return name
    obstacle = shm_obstacle(world.identities)
    if name == "shm" and obstacle:
        raise ConfigError(f"transport='shm' cannot be used: {obstacle}; use transport='dist', or 'auto'")
    if name == "auto":
        return "dist" if obstacle else "shm"
    return name


def shm_obstacle(identities: Sequence[Mapping[str, Any]]) -> str:
    """Why ranks with these :func:`~.world.identity` rows cannot use shared memory; empty where they can."""
    without = [rank for rank, row in enumerate(identities) if not row["extension"]]
    if without:
        return f"the C++ extension is not built on rank {without[0]} (`pipekern doctor` says why)"
    apart = [rank for rank, row in enumerate(identities) if not same_host(row, identities[0])]
    if apart:
        return f"ranks 0 and {apart[0]} are on different hosts, or in containers that share no namespaces"
    return ""
