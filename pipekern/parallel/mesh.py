"""Where a process stands among pipeline ranks, data-parallel replicas and tensor-parallel parts.

mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
grid = Grid.of(mesh, world_size=4)
grid.sizes                                  # Place(pp=2, dp=2, tp=1)
grid.place(3)                               # Place(pp=1, dp=1, tp=0)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pipekern.errors import ConfigError

Mesh = DeviceMesh | Mapping[str, int] | None


class Place(NamedTuple):
    """A pipeline rank, a data-parallel replica, and a tensor-parallel part; or how many there are of each."""

    pp: int
    dp: int
    tp: int


_WHOSE = {"dp": "replicas", "tp": "tensor-parallel parts"}
FIRST, ALONE = Place(0, 0, 0), Place(1, 1, 1)


@dataclass(frozen=True)
class Grid:
    """Every process of the job once: ``ranks[pp][dp][tp]`` is its rank in the job."""

    ranks: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def of(cls, mesh: Mesh, world_size: int) -> Grid:
        """The grid of a mesh with dimensions out of "pp", "dp" and "tp", or of their sizes, where "pp" may be left out
        and the last one named runs fastest; None: every process is a pipeline rank. Raises ``ConfigError``.
        """
        if isinstance(mesh, DeviceMesh):
            return cls._from_tensor(mesh.mesh, tuple(mesh.mesh_dim_names or ()), world_size)
        if not isinstance(mesh, Mapping | None):
            raise ConfigError(f"mesh={mesh!r}; give a DeviceMesh, or sizes such as {{'dp': 2}}")
        sizes = dict(mesh or {})
        if "pp" not in sizes:
            others = math.prod(size for size in sizes.values() if isinstance(size, int)) or 1
            sizes = {"pp": max(world_size // others, 1), **sizes}
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes.values()):
            raise ConfigError(f"mesh={dict(mesh or {})}: sizes are whole numbers of at least 1")
        if math.prod(sizes.values()) != world_size:
            product = " × ".join(f"{name} {size}" for name, size in sizes.items())
            raise ConfigError(
                f"mesh: {product} is {math.prod(sizes.values())} processes, and the launcher started {world_size}; the "
                "sizes must multiply to that"
            )
        return cls._from_tensor(torch.arange(world_size).reshape(*sizes.values()), tuple(sizes), world_size)

    @classmethod
    def _from_tensor(cls, ranks: torch.Tensor, names: tuple[str, ...], world_size: int) -> Grid:
        unknown = [name for name in names if name not in Place._fields]
        if unknown or len(names) != ranks.dim():
            raise ConfigError(
                f"mesh has dimensions {names or 'without names'}; name each of them 'pp', 'dp' or 'tp' (mesh_dim_names)"
            )
        if sorted(ranks.flatten().tolist()) != list(range(world_size)):
            raise ConfigError(
                f"mesh has {ranks.numel()} processes, and the launcher started {world_size}; every process of the job "
                "must be in it once"
            )
        order = [names.index(name) for name in Place._fields if name in names]
        sizes = [ranks.shape[names.index(name)] if name in names else 1 for name in Place._fields]
        table = ranks.permute(order).reshape(sizes).tolist()
        return cls(tuple(tuple(tuple(row) for row in plane) for plane in table))

    @property
    def sizes(self) -> Place:
        """How many there are along each dimension."""
        return Place(len(self.ranks), len(self.ranks[0]), len(self.ranks[0][0]))

    @property
    def pipelines(self) -> list[Place]:
        """Each pipeline, a replica's part, as the place of its first rank; in the order of replicas, then parts."""
        _, replicas, parts = self.sizes
        return [Place(0, dp, tp) for dp in range(replicas) for tp in range(parts)]

    @property
    def homes(self) -> list[list[int]]:
        """For each of :attr:`pipelines` the job's ranks, by the pipeline's."""
        return [[self.rank(first._replace(pp=rank)) for rank in range(self.sizes.pp)] for first in self.pipelines]

    def place(self, rank: int) -> Place:
        """Where ``rank`` of the job stands."""
        for pp, plane in enumerate(self.ranks):
            for dp, row in enumerate(plane):
                if rank in row:
                    return Place(pp, dp, row.index(rank))
        raise ValueError(f"rank {rank} is not in the mesh")

    def rank(self, place: Place) -> int:
        """The job's rank that stands there."""
        return self.ranks[place.pp][place.dp][place.tp]


def groups(
    grid: Grid, rank: int, devices: Sequence[torch.device], along: str, timeout: float
) -> dist.ProcessGroup | None:
    """The process group of ``rank`` along "dp" or "tp", over NCCL between GPUs, else gloo; None where it would be
    alone. ``devices`` are by rank of the job. A blocking call in it fails after ``timeout`` seconds. Collective over
    the job. Raises ``ConfigError`` on all ranks where devices of two kinds would be in one group.
    """
    if getattr(grid.sizes, along) == 1:
        return None
    place, own, starts = grid.place(rank), None, _starts(grid.sizes, along)
    rows = [[grid.rank(start._replace(**{along: i})) for i in range(getattr(grid.sizes, along))] for start in starts]
    for members in rows:
        if len({devices[member].type for member in members}) > 1:
            kinds = ", ".join(f"rank {member} on {devices[member]}" for member in members)
            raise ConfigError(
                f"mesh: the {_WHOSE[along]} of pipeline rank {grid.place(members[0]).pp} are on devices of two kinds "
                f"({kinds}); a mesh may give each pipeline rank its kind, and all of its processes the same"
            )
    for start, members in zip(starts, rows, strict=True):
        backend = "nccl" if devices[members[0]].type == "cuda" else "gloo"
        group = dist.new_group(members, timeout=timedelta(seconds=timeout), backend=backend)
        if place._replace(**{along: 0}) == start:
            own = group
    return own


def _starts(sizes: Place, along: str) -> list[Place]:
    every = sizes._replace(**{along: 1})
    return [Place(pp, dp, tp) for pp in range(every.pp) for dp in range(every.dp) for tp in range(every.tp)]
