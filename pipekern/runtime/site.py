"""Where a process stands, which stays as it is while its pipeline lives, whatever becomes of split and schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipekern.parallel.mesh import Grid, Place
from pipekern.parallel.replicas import Replicas


@dataclass(frozen=True)
class Site:
    """One process: the ``rank`` of its pipeline that it is (None: it has all of them), and its ``place``.

    ``devices`` are by rank of the job, ``homes[p]`` the job's ranks of pipeline p by the pipeline's. ``replicas`` is
    None where this process's stages have no others, ``bucket`` the most bytes that go between them at once. ``apart``
    are the pairs of ranks of a pipeline, least first, on two hosts, each with all tensor-parallel parts of its stages.
    """

    grid: Grid
    place: Place
    rank: int | None
    devices: Sequence[torch.device]
    homes: Sequence[Sequence[int]]
    replicas: Replicas | None
    bucket: int
    apart: frozenset[tuple[int, int]] = frozenset()

    @property
    def pipeline(self) -> int:
        """The number of its pipeline."""
        return self.place.dp * self.grid.sizes.tp + self.place.tp

    @property
    def own(self) -> list[torch.device]:
        """The devices of its pipeline, by rank."""
        return [self.devices[home] for home in self.homes[self.pipeline]]
