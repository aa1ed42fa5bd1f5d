"""Where processes stand: of sizes, of a DeviceMesh, and what is refused."""

from __future__ import annotations

import os
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pipekern.errors import ConfigError
from pipekern.parallel.mesh import ALONE, Grid, Place, groups
from tests.launch import launch, values


def test_golden() -> None:
    """Two replicas of two pipeline ranks: the last dimension runs fastest."""
    grid = Grid.of({"dp": 2, "pp": 2}, 4)
    assert grid.ranks == (((0,), (2,)), ((1,), (3,)))  # by pipeline rank, replica, part
    assert grid.sizes == Place(pp=2, dp=2, tp=1)
    assert [grid.place(rank) for rank in range(4)] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert grid.pipelines == [Place(0, 0, 0), Place(0, 1, 0)]


def test_without_a_mesh_every_process_is_a_pipeline_rank() -> None:
    assert Grid.of(None, 1).sizes == ALONE
    assert Grid.of(None, 3).ranks == (((0,),), ((1,),), ((2,),))


def test_pipeline_ranks_are_what_is_left() -> None:
    """And they run slowest, where they are not named: replicas are then neighbours."""
    assert (
        Grid.of({"dp": 2}, 6).ranks
        == Grid.of({"pp": 3, "dp": 2}, 6).ranks
        == (((0,), (1,)), ((2,), (3,)), ((4,), (5,)))
    )
    assert Grid.of({"dp": 2, "tp": 3}, 6).sizes == Place(1, 2, 3)


@pytest.mark.parametrize("shape", [(2, 3, 2), (1, 4, 2), (3, 1, 1)])
def test_any_order_of_dimensions(shape: tuple[int, ...]) -> None:
    """A rank's place along each dimension is its index in torch.arange(n).reshape(sizes)."""
    names = Random().sample(Place._fields, 3)
    grid = Grid.of(dict(zip(names, shape, strict=True)), torch.Size(shape).numel())
    table = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for rank in table.flatten().tolist():
        (index,) = (table == rank).nonzero().tolist()
        assert grid.place(rank)._asdict() == dict(zip(names, index, strict=True))
        assert grid.rank(grid.place(rank)) == rank
    assert sorted(grid.rank(first) for first in grid.pipelines) == sorted(
        row for plane in grid.ranks[:1] for one in plane for row in one
    )


def _of_device_mesh() -> list[Any]:
    dist.init_process_group("gloo")
    found: list[Any] = []
    for shape, names in (((2, 2), ("dp", "pp")), ((2, 2), ("pp", "dp")), ((4,), ("dp",))):
        grid = Grid.of(init_device_mesh("cpu", shape, mesh_dim_names=names), 4)
        assert grid == Grid.of(dict(zip(names, shape, strict=True)), 4)
        found.append(grid.ranks)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    for refused in (
        mesh["pp"],
        init_device_mesh("cpu", (4,)),
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "pp")),
    ):
        try:
            Grid.of(refused, 4)
        except ConfigError as error:
            found.append(str(error))
    shuffled = DeviceMesh("cpu", torch.tensor([[3, 0], [1, 2]]), mesh_dim_names=("pp", "dp"))
    found.append(Grid.of(shuffled, 4).ranks)
    return found


def test_of_a_device_mesh() -> None:
    """Its own order of ranks counts; a part of one, names that are none, and none at all are refused."""
    for replicas_outside, replicas_inside, replicas_alone, *refused, shuffled in values(launch(_of_device_mesh, 4)):
        assert replicas_outside == (((0,), (2,)), ((1,), (3,)))
        assert replicas_inside == (((0,), (1,)), ((2,), (3,)))
        assert replicas_alone == (((0,), (1,), (2,), (3,)),)
        part, nameless, unknown = refused
        assert "mesh has 2 processes, and the launcher started 4" in part
        assert "dimensions without names; name each of them 'pp', 'dp' or 'tp'" in nameless
        assert "dimensions ('x', 'pp'); name each of them" in unknown
        assert shuffled == (((3,), (0,)), ((1,), (2,)))


@pytest.mark.parametrize(
    ("mesh", "world_size", "message"),
    [
        ({"dp": 2}, 3, "pp 1 × dp 2 is 2 processes, and the launcher started 3; the sizes must multiply"),
        ({"dp": 2, "pp": 2}, 2, "dp 2 × pp 2 is 4 processes, and the launcher started 2"),
        ({"dp": 4}, 2, "pp 1 × dp 4 is 4 processes"),
        ({"dp": 0}, 2, r"\{'dp': 0\}: sizes are whole numbers of at least 1"),
        ({"dp": -2}, 2, "whole numbers"),
        ({"dp": 1.0}, 2, "whole numbers"),
        ({"dp": True}, 2, "whole numbers"),
        ({"dp": "2"}, 2, "whole numbers"),
        ({"pp": 1, "ep": 2}, 2, r"dimensions \('pp', 'ep'\); name each of them 'pp', 'dp' or 'tp'"),
        ("dp", 2, "mesh='dp'; give a DeviceMesh, or sizes"),
        ([("dp", 2)], 2, r"mesh=\[\('dp', 2\)\]; give a DeviceMesh, or sizes"),
        (2, 2, "mesh=2; give a DeviceMesh"),
    ],
)
def test_refused(mesh: Any, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Grid.of(mesh, world_size)


def test_a_rank_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="rank 2 is not in the mesh"):
        Grid.of(None, 2).place(2)


def _groups(sizes: dict[str, int]) -> list[list[int] | None]:
    dist.init_process_group("gloo")
    rank, grid = int(os.environ["RANK"]), Grid.of(sizes, 4)
    found = [groups(grid, rank, [torch.device("cpu")] * 8, along, 30.0) for along in ("dp", "tp")]
    return [None if group is None else dist.get_process_group_ranks(group) for group in found]


def test_devices_of_two_kinds_in_one_group() -> None:
    """Refused on every rank before any group is made; each pipeline rank may have a kind of its own."""
    grid = Grid.of({"dp": 2, "pp": 2}, 4)
    card, cpu = torch.device("cuda", 0), torch.device("cpu")
    for rank in range(4):
        with pytest.raises(ConfigError, match=r"replicas of pipeline rank 1 .* \(rank 1 on cuda:0, rank 3 on cpu\)"):
            groups(grid, rank, [card, card, card, cpu], "dp", 30.0)
        assert groups(grid, rank, [card, cpu, cpu, card], "tp", 30.0) is None


def test_groups() -> None:
    """Those of one place but for the named dimension, in its order; none where a process would be alone."""
    assert values(launch(_groups, 4, {"dp": 2, "pp": 2})) == [
        [[0, 2], None],
        [[1, 3], None],
        [[0, 2], None],
        [[1, 3], None],
    ]
    assert values(launch(_groups, 4, {"dp": 2, "tp": 2})) == [
        [[0, 2], [0, 1]], [[1, 3], [0, 1]], [[0, 2], [2, 3]], [[1, 3], [2, 3]],
    ]  # fmt: skip
