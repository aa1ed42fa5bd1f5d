"""Small values that every rank must know, over the links of the job."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from pipekern.runtime.collective import Star, star_links
from pipekern.runtime.outgoing import Outgoing
from pipekern.transport.base import Link
from pipekern.transport.open import open_transport
from pipekern.transport.world import join
from tests.launch import launch, values


def test_golden() -> None:
    """Around rank 1 of three: down to each other rank, up from each."""
    assert star_links(3, root=1) == [
        Link("down 0", 1, 0, 2), Link("down 2", 1, 2, 2), Link("up 0", 0, 1, 2), Link("up 2", 2, 1, 2),
    ]  # fmt: skip
    assert star_links(1, root=0) == []


def _exchange(ranks: int, root: int) -> list[Any]:
    """Three rounds of a gather and a publication."""
    world = join("shm", 20.0)
    transport, senders, receivers = open_transport("shm", star_links(ranks, root), [torch.device("cpu")] * ranks, world)
    rank = int(os.environ["RANK"])
    star = Star(rank, ranks, root, Outgoing(transport, receivers.values(), alone=False), senders, receivers)
    seen: list[Any] = []
    for step in range(3):
        rows = star.gather({"rank": rank, "of": torch.full((rank, 2), float(step)), "none": None})
        seen.append([(row["rank"], row["of"].tolist(), row["none"]) for row in rows])
        if rank == root:
            star.publish(step, torch.tensor([step, root]))
        else:
            seen.append(star.receive(step).tolist())
    transport.close()
    return seen


@pytest.mark.parametrize(("ranks", "root"), [(2, 1), (3, 2), (4, 0)])
def test_every_rank_learns_every_value(ranks: int, root: int) -> None:
    results = values(launch(_exchange, ranks, ranks, root))
    gathered = [[(rank, [[float(step)] * 2] * rank, None) for rank in range(ranks)] for step in range(3)]
    for rank, seen in enumerate(results):
        if rank == root:
            assert seen == gathered
        else:
            assert seen == [item for step in range(3) for item in (gathered[step], [step, root])]


def test_one_process_has_nobody_to_tell() -> None:
    transport, senders, receivers = open_transport("local", [], [torch.device("cpu")] * 3, None)
    star = Star(None, 3, 2, Outgoing(transport, receivers.values(), alone=True), senders, receivers)
    assert star.alone
    assert star.gather(5) == [5]
    star.publish(0, torch.zeros(1))
