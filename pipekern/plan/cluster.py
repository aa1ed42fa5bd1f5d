"""The devices that a plan may use, one a rank in order, and the links between neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipekern.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """``flops`` operations and ``bandwidth`` bytes of memory a second, ``memory`` bytes.

    Give what is reached, not what is advertised: about half the peak for matrix products in bf16.
    """

    flops: float
    memory: float = math.inf
    bandwidth: float = math.inf
    name: str = "device"

    def __post_init__(self) -> None:
        if not (self.flops > 0 and math.isfinite(self.flops)):
            raise ConfigError(f"{self.name}: flops={self.flops}; give operations a second, a finite number above 0")
        for what in ("memory", "bandwidth"):
            if not getattr(self, what) > 0:
                raise ConfigError(f"{self.name}: {what}={getattr(self, what)}; give bytes, a number above 0")


@dataclass(frozen=True)
class Link:
    """``latency`` microseconds for a message, and ``bandwidth`` bytes a second."""

    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        if not (self.latency >= 0 and math.isfinite(self.latency)):
            raise ConfigError(f"link: latency={self.latency} is not a finite number of microseconds of at least 0")
        if not self.bandwidth > 0:
            raise ConfigError(f"link: bandwidth={self.bandwidth}; give bytes a second, a number above 0")

    def time(self, size: float) -> float:
        """Microseconds that a message of ``size`` bytes takes."""
        return self.latency + 1e6 * size / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """``devices[r]`` is rank r's, ``links[r]`` the link between ranks r and r + 1.

    ``copy_bandwidth`` is what a rank copies a message with itself, in bytes a second: that time is the sender's, in the
    forward for activations and in the backward for gradients. Infinite where a copy engine does it.
    Raises ``ConfigError`` where there is no device or not one link between each two neighbours.
    """

    devices: tuple[Device, ...]
    links: tuple[Link, ...]
    copy_bandwidth: float = math.inf

    def __post_init__(self) -> None:
        if not self.devices:
            raise ConfigError("devices=[]: a plan needs at least one device; describe what the ranks run on")
        if len(self.links) != len(self.devices) - 1:
            raise ConfigError(
                f"{len(self.links)} links for {len(self.devices)} devices; give {len(self.devices) - 1}, one between "
                "each two neighbours, or one for all"
            )
        if not self.copy_bandwidth > 0:
            raise ConfigError(f"copy_bandwidth={self.copy_bandwidth}; give bytes a second, a number above 0")

    @classmethod
    def of(cls, devices: Sequence[Device], link: Link | None = None, copy_bandwidth: float = math.inf) -> Cluster:
        """All neighbours joined by the same ``link`` (default: one that takes no time)."""
        return cls(tuple(devices), (link or Link(),) * (len(devices) - 1), copy_bandwidth)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cluster:
        """From plain values: ``devices`` (each a device's fields, ``count`` of them), ``link`` or ``links``."""
        try:
            devices = []
            for row in data["devices"]:
                options = dict(row)
                devices += [Device(**{k: v for k, v in options.items() if k != "count"})] * options.get("count", 1)
            copy = data.get("copy_bandwidth", math.inf)
            if "links" in data:
                return cls(tuple(devices), tuple(Link(**row) for row in data["links"]), copy)
            return cls.of(devices, Link(**data.get("link", {})), copy)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"the cluster cannot be read ({type(error).__name__}: {error}); it needs 'devices', a list of objects "
                "with flops, memory, bandwidth, name, count, and 'link' or 'links' with latency and bandwidth"
            ) from error

    @property
    def ranks(self) -> int:
        return len(self.devices)

    def speed(self, rank: int) -> float:
        """How many times as fast as rank 0 a rank computes."""
        return self.devices[rank].flops / self.devices[0].flops

    def message(self, source: int, target: int, size: float) -> float:
        """Microseconds of a message between two ranks, over the slowest of the links on the way."""
        low, high = sorted((source, target))
        return max((link.time(size) for link in self.links[low:high]), default=0.0)

    def copy(self, size: float) -> float:
        """Microseconds for which a rank copies a message itself."""
        return 1e6 * size / self.copy_bandwidth

    def reordered(self, order: Sequence[int]) -> Cluster:
        """The same links with the devices in another order."""
        return Cluster(tuple(self.devices[place] for place in order), self.links, self.copy_bandwidth)
