"""Where a process stands."""

from __future__ import annotations

import torch

from pipekern.parallel.mesh import Grid
from pipekern.runtime.site import Site


def test_devices_are_those_of_the_jobs_ranks() -> None:
    """Also where a process is another rank of its pipeline than of the job: with dp × pp, ranks 2 and 3 are the second
    pipeline's.
    """
    grid = Grid.of({"dp": 2, "pp": 2}, 4)
    devices = [torch.device("cuda", rank) for rank in range(4)]
    for rank in range(4):
        place = grid.place(rank)
        site = Site(grid, place, place.pp, devices, grid.homes, None, 0)
        assert site.pipeline == rank // 2
        assert site.own == devices[rank // 2 * 2 :][:2] and site.own[place.pp] == devices[rank]
