"""Which transport a job uses, and its links.

    world = join("auto", timeout=60.0)
    transport, senders, receivers = open_transport("auto", links, [torch.device("cpu")] * 2, world)

Both are collective: every rank of the job calls them, with the same links.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pipekern.errors import ConfigError
from pipekern.transport.base import Link, Receiver, Sender, Transport
from pipekern.transport.dist import DistTransport
from pipekern.transport.local import LocalTransport
from pipekern.transport.null import NullTransport
from pipekern.transport.world import World, same_host

if TYPE_CHECKING:
    from pipekern.transport.cuda import CudaTransport
    from pipekern.transport.shm import ShmTransport

NAMES = ("auto", "shm", "cuda", "dist", "local", "null")


_NOBODY_ELSE = 60.0  # seconds: the timeout of a job in one process, where nothing is waited for


class Opened(NamedTuple):
    """A transport and this process's ends of its links, by link name."""

    transport: Transport
    senders: Mapping[str, Sender]
    receivers: Mapping[str, Receiver]


def open_transport(name: str, links: Sequence[Link], devices: Sequence[torch.device], world: World | None) -> Opened:
    """Open ``links``, the same list on every rank; collective. ``world`` is what ``join(name, timeout)`` returned.

    ``devices``: one a rank. "auto" is "cuda" where all ranks share a host, have the C++ extension and are on GPUs, or
    some of them on the CPU, else "shm" where they share a host and have it, else "dist"; where this process has every
    rank it is "cuda" over several GPUs, else "local". The transport takes the world over: closing it closes the world.
    Raises ``ConfigError``, and what happens to the job meanwhile: if one rank fails, all do.
    """
    chosen = choose(name, world, devices)
    _check_codecs(chosen, links, devices)
    if world is not None and chosen in ("shm", "cuda", "dist"):
        try:
            return _open_dist(world, links) if chosen == "dist" else _open_here(chosen, world, links, devices)
        except BaseException as error:
            world.abort(error, f"rank {world.rank}, opening the {chosen} transport")
            world.close()
            raise
    if world is not None:
        world.close()
    transport: Transport
    if chosen == "cuda":
        transport = cuda_transport(devices, None)
    else:
        transport = NullTransport() if chosen == "null" else LocalTransport(len(devices))
    return Opened(transport, *transport.open(links))


def _check_codecs(chosen: str, links: Sequence[Link], devices: Sequence[torch.device]) -> None:
    on_cpu = hosts(devices)
    for link in links:
        if link.codec == "none":
            continue
        if chosen != "cuda":
            raise ConfigError(
                f"codec={link.codec!r}: the transport here is {chosen!r}, and only 'cuda' casts; leave codec out, or "
                "give 'auto'"
            )
        if on_cpu & {link.source, link.target}:
            raise ConfigError(
                f"codec={link.codec!r} on link {link.name}, from {devices[link.source]} to {devices[link.target]}: only"
                " links between CUDA devices cast; give 'auto', or name those alone: {'0>1': 'bf16'}"
            )


def _open_dist(world: World, links: Sequence[Link]) -> Opened:
    transport = DistTransport(world)
    try:
        return Opened(transport, *transport.open(links))
    except BaseException as error:
        transport.abort(error, f"rank {world.rank}, opening links over gloo")
        transport.close()
        raise


def _open_here(chosen: str, world: World, links: Sequence[Link], devices: Sequence[torch.device]) -> Opened:
    transport = cuda_transport(devices, world) if chosen == "cuda" else _shm_transport(world)
    opened = Opened(transport, *transport.open(links))
    world.gather({})
    world.close()  # every rank has its links: from here on the transport itself watches
    return opened


def _shm_transport(world: World) -> ShmTransport:
    from pipekern.transport.shm import ShmTransport  # only here: it needs the C++ extension

    return ShmTransport(world.rank, world.size, _token(world), world.timeout, lambda: world.gather({}))


def cuda_transport(devices: Sequence[torch.device], world: World | None) -> CudaTransport:
    """A new one, without links; collective."""
    from pipekern.transport.cuda import CudaTransport  # only here: it needs the C++ extension

    if world is None:
        return CudaTransport(None, len(devices), secrets.token_hex(16), _NOBODY_ELSE, lambda: None, devices)
    return CudaTransport(
        world.rank,
        world.size,
        _token(world),
        world.timeout,
        lambda: world.gather({}),
        devices,
        hosts=hosts(devices),
    )


def _token(world: World) -> str:
    return str(world.gather({"token": secrets.token_hex(16)})[0]["token"])


def check_name(name: str) -> None:
    """Raise ``ConfigError`` for what is no transport."""
    if name not in NAMES:
        near = get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"transport={name!r} is not one of {', '.join(map(repr, NAMES))}{hint}")


def choose(name: str, world: World | None, devices: Sequence[torch.device]) -> str:
    """The transport that ``name`` stands for; collective. Raises ``ConfigError`` where it cannot be had."""
    check_name(name)
    if name not in ("auto", "shm", "cuda"):
        return name
    alone = world is None or world.size == 1
    if alone and name == "auto" and len(set(devices)) == 1:
        return "local"
    sharing = "" if world is None else shm_obstacle(world.identities)
    cuda = sharing or _cuda_obstacle(world, devices)
    obstacle = cuda if name == "cuda" else sharing
    if obstacle and name != "auto":
        raise ConfigError(f"transport={name!r} cannot be used: {obstacle}; use transport='dist', or 'auto'")
    if name != "auto":
        return name
    if not cuda:
        return "cuda"
    if alone:
        return "local"
    return "dist" if sharing else "shm"


def hosts(devices: Sequence[torch.device]) -> frozenset[int]:
    """The ranks on the CPU; ``devices`` is by rank."""
    return frozenset(rank for rank, device in enumerate(devices) if device.type == "cpu")


def _cuda_obstacle(world: World | None, devices: Sequence[torch.device]) -> str:
    """Why not all ranks can send and receive on their devices; empty where they can. Collective."""
    on_cpu = hosts(devices)
    if world is None:
        if 0 < len(on_cpu) < len(devices):
            return f"in one process rank {min(on_cpu)} on the CPU takes part in 'local' alone"
        return next(filter(None, map(device_obstacle, devices)), "")
    mixed = len(on_cpu) < world.size and world.rank in on_cpu
    rows = world.gather({"cuda": "" if mixed else device_obstacle(devices[world.rank])})
    return next((f"rank {rank}: {row['cuda']}" for rank, row in enumerate(rows) if row["cuda"]), "")


def device_obstacle(device: torch.device) -> str:
    """Why this process cannot send and receive on ``device``; empty where it can."""
    if device.type != "cuda":
        return f"its device is {device}, and the transport is for CUDA devices"
    try:
        from pipekern import _C
    except ImportError:
        return "the C++ extension is not built (`pipekern doctor` says why)"
    return _C.cuda_obstacle()


def shm_obstacle(identities: Sequence[Mapping[str, Any]]) -> str:
    """Why ranks with these :func:`~.world.identity` rows cannot use shared memory; empty where they can."""
    without = [rank for rank, row in enumerate(identities) if not row["extension"]]
    if without:
        return f"the C++ extension is not built on rank {without[0]} (`pipekern doctor` says why)"
    apart = [rank for rank, row in enumerate(identities) if not same_host(row, identities[0])]
    if apart:
        return f"ranks 0 and {apart[0]} are on different hosts, or in containers that share no namespaces"
    return ""
