"""Which transport a job gets."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from pipekern.errors import Aborted, ConfigError
from pipekern.transport import open as opening
from pipekern.transport import world as world_module
from pipekern.transport.base import Link
from pipekern.transport.open import check_name, choose, open_transport, shm_obstacle
from pipekern.transport.world import identity, join
from tests.launch import launch, values
from tests.transport.programs import CPUS, PAIR, SHM


def opened(name: str, without_extension: int = -1) -> Any:
    """The name of the transport that each rank gets, after a message both ways, or its ConfigError."""
    facts = world_module.identity

    def missing() -> dict[str, Any]:
        return {**facts(), "extension": False}

    if int(os.environ["RANK"]) == without_extension:
        world_module.identity = missing
    world = join(name, 30.0)
    assert world is not None
    try:
        transport, senders, receivers = open_transport(name, PAIR, CPUS, world)
    except ConfigError as error:
        return str(error)
    other = 1 - world.rank
    assert senders[f"{world.rank}>{other}"].send(0, world.rank)
    message = receivers[f"{other}>{world.rank}"].recv(0)
    assert message is not None and message.value == other
    transport.close()
    return transport.name


@pytest.mark.parametrize("transport", [SHM])
def test_auto_is_shared_memory_on_one_host(transport: str) -> None:
    assert values(launch(opened, 2, "auto")) == [transport] * 2


def test_auto_is_dist_where_one_rank_has_no_extension() -> None:
    assert values(launch(opened, 2, "auto", 1)) == ["dist", "dist"]


def test_shared_memory_that_cannot_be_had_is_refused_on_every_rank() -> None:
    texts = values(launch(opened, 2, "shm", 1))
    assert texts[0] == texts[1] and "the C++ extension is not built on rank 1" in texts[0]


def test_auto_is_local_without_a_launcher() -> None:
    transport, senders, receivers = open_transport("auto", PAIR, CPUS, None)
    assert transport.name == "local" and list(senders) == list(receivers) == ["0>1", "1>0"]
    assert open_transport("null", PAIR, CPUS, None).transport.name == "null"


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"transport='shmem'.*did you mean 'shm'"):
        check_name("shmem")


def test_the_obstacle_names_the_rank() -> None:
    here = {**identity(), "extension": True}
    assert shm_obstacle([here, here]) == ""
    assert "ranks 0 and 2 are on different hosts" in shm_obstacle([here, here, {**here, "boot": "another"}])
    assert "not built on rank 1" in shm_obstacle([here, {**here, "extension": False}])


def fails_to_open(links: list[Link]) -> Any:
    world = join("dist", 60.0)
    assert world is not None
    with pytest.raises((ConfigError, Aborted)) as caught:
        open_transport("dist", links if world.rank == 1 else PAIR, CPUS, world)
    return type(caught.value).__name__, str(caught.value)


def test_a_failure_to_open_on_one_rank_is_raised_by_all() -> None:
    zero, one = values(launch(fails_to_open, 2, [Link("0>5", 0, 5, 1)], timeout=30.0))
    assert one[0] == "ConfigError" and "does not join two ranks of 0 to 1" in one[1]
    assert zero[0] == "Aborted" and "does not join two ranks of 0 to 1" in zero[1]


def test_ranks_that_open_different_links_are_told() -> None:
    for _, text in values(launch(fails_to_open, 2, [*PAIR, Link("more", 0, 1, 1)], timeout=30.0)):
        assert "the ranks open different links" in text and '["more", 0, 1, 1, "none"]' in text


def chosen(name: str, kinds: list[str], obstacle: str) -> str:
    """What a rank of a mix gets; ``obstacle`` is what the GPUs' ranks find in their way."""
    opening.device_obstacle = lambda device: f"{device}: {obstacle}" if obstacle else ""
    world = join(name, 30.0)
    assert world is not None
    try:
        return choose(name, world, [torch.device(kind) for kind in kinds])
    except ConfigError as error:
        return str(error)
    finally:
        world.close()


@pytest.mark.parametrize("transport", [SHM])
def test_ranks_of_both_kinds(transport: str) -> None:
    """Those on the CPU need no driver; where a GPU's rank has none, all go over shared memory."""
    assert values(launch(chosen, 2, "auto", ["cuda:0", "cpu"], "")) == ["cuda"] * 2
    assert values(launch(chosen, 2, "cuda", ["cpu", "cuda:0"], "")) == ["cuda"] * 2
    assert values(launch(chosen, 2, "shm", ["cuda:0", "cpu"], "no driver")) == [transport] * 2
    assert values(launch(chosen, 2, "auto", ["cuda:0", "cpu"], "no driver")) == [transport] * 2
    for text in values(launch(chosen, 2, "cuda", ["cpu", "cuda:0"], "no driver")):
        assert "transport='cuda' cannot be used: rank 1: cuda:0: no driver" in text
    for text in values(launch(chosen, 2, "cuda", ["cpu", "cpu"], "not for CUDA")):
        assert "transport='cuda' cannot be used: rank 0: cpu: not for CUDA" in text


def test_in_one_process_a_mix_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipekern._C.cuda_obstacle", lambda: "")
    devices = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")]
    assert choose("auto", None, devices) == "local" and choose("auto", None, devices[:2]) == "cuda"
    with pytest.raises(ConfigError, match="transport='cuda' cannot be used: in one process rank 2 on the CPU"):
        choose("cuda", None, devices)


def test_a_codec_on_a_link_to_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "choose", lambda *_: "cuda")
    devices = [torch.device("cuda", 0), torch.device("cpu")]
    with pytest.raises(ConfigError, match=r"codec='fp8' on link 0>1, from cuda:0 to cpu: only links between CUDA"):
        open_transport("auto", [Link("0>1", 0, 1, 2, "fp8")], devices, None)
