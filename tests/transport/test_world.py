"""Meeting the other processes of a job."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipekern.errors import Aborted, ConfigError, PeerDied, TransportTimeout
from pipekern.transport.world import identity, join, same_host
from tests.launch import launch, rendezvous, values


def meets() -> Any:
    world = join("auto", 30.0)
    assert world is not None
    rows = world.gather({"rank": world.rank, "nested": {"a": (1, None)}})
    again = world.gather({})
    world.close()
    world.close()
    return world.rank, world.size, rows, again, [row["pid"] for row in world.identities]


def test_golden() -> None:
    ended = values(launch(meets, 3))
    rows = [{"rank": rank, "nested": {"a": [1, None]}} for rank in range(3)]
    assert [row[:4] for row in ended] == [(rank, 3, rows, [{}] * 3) for rank in range(3)]
    assert len(set(ended[0][4])) == 3 and ended[0][4] == ended[1][4] == ended[2][4]


def test_without_a_launcher_there_is_no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert join("auto", 1.0) is None and join("local", 1.0) is None and join("null", 1.0) is None
    for name in ("shm", "dist"):
        with pytest.raises(ConfigError, match=f"transport='{name}'.*torchrun"):
            join(name, 1.0)


def in_the_users_group() -> Any:
    dist.init_process_group("gloo")
    for _ in range(2):
        world = join("auto", 30.0)
        assert world is not None
        world.gather({})
        world.close()
    total = torch.ones(1)
    dist.all_reduce(total)  # the group is still there
    dist.destroy_process_group()
    return total.item()


@pytest.mark.parametrize("store", ["outside", "rank 0"])
def test_jobs_follow_each_other_in_the_users_process_group(store: str) -> None:
    assert values(launch(in_the_users_group, 2, store=store)) == [2.0, 2.0]


def test_jobs_of_other_ranks_follow_each_other_in_a_launchers_store() -> None:
    """As after a restart by torchrun: what the ranks before have written under their numbers is still there."""
    with rendezvous("outside") as address:
        for ranks in (2, 3, 2):
            assert [row[1] for row in values(launch(meets, ranks, environ=address))] == [ranks] * ranks


def too_few() -> Any:
    with pytest.raises(TransportTimeout) as caught:
        join("auto", 0.5)
    return str(caught.value)


def test_ranks_that_do_not_start_are_not_waited_for_longer_than_the_timeout() -> None:
    (text,) = values(launch(too_few, 1, environ={"WORLD_SIZE": "2"}))
    assert "2 ranks did not meet within 0.5 s" in text


def dies_in_construction(how: str) -> Any:
    world = join("auto", 60.0)
    assert world is not None
    if world.rank == 1 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if world.rank == 1 and how == "closed":
        world.close()
        return None
    if world.rank == 1 and how == "failed":
        world.abort(ConfigError("layers=3 cannot be cut in 4"), "rank 1, construction")
        world.close()
        return None
    with pytest.raises((PeerDied, Aborted)) as caught:
        world.gather({})
    world.close()
    return type(caught.value).__name__, caught.value.rank, str(caught.value)


@pytest.mark.parametrize("store", ["outside", "rank 0"])
@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("killed", "PeerDied", "rank 1 has died"),
        ("closed", "PeerDied", "rank 1 has left the job before"),
        ("failed", "Aborted", "layers=3"),
    ],
)
def test_a_rank_that_goes_during_construction_is_named(how: str, kind: str, text: str, store: str) -> None:
    outcomes = launch(dies_in_construction, 3, how, store=store)
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.error is None, f"{outcome.error}\n{outcome.output}"
        assert outcome.value[:2] == (kind, 1) and text in outcome.value[2]


def test_same_host_is_boot_and_namespaces() -> None:
    here = identity()
    assert same_host(here, {**here, "pid": 1, "version": "other", "extension": False})
    for key in ("boot", "net", "pid_namespace"):
        assert not same_host(here, {**here, key: "another"})
