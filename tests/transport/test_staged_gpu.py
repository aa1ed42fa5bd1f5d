"""Links between a GPU and a rank on the CPU, and pipelines over both. tests/csrc/cuda/test_staged.cpp and the contract
suite run the same code on the stand-in driver.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipekern.errors import PeerDied
from pipekern.transport.base import Link
from tests.launch import launch, values
from tests.runtime.test_mixed_devices import difference
from tests.transport.test_cuda_gpu import barrier

pytest.importorskip("pipekern._C")
from pipekern.transport.cuda import CudaTransport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DEVICES = [torch.device("cuda", 0), torch.device("cpu")]
LINKS = [Link("0>1", 0, 1, 2), Link("1>0", 1, 0, 2)]
SIZE = 1 << 22


def join(token: str) -> Any:
    """Rank 0 on the GPU, rank 1 on the CPU."""
    rank = int(os.environ["RANK"])
    transport = CudaTransport(rank, 2, token, 60.0, lambda: barrier("bound"), DEVICES, hosts={1})
    return rank, transport, *transport.open(LINKS)


def send(sender: Any, tag: int, value: Any) -> None:
    while not sender.send(tag, value, given=True):
        time.sleep(0)


def there_and_back(token: str, rounds: int) -> None:
    """Large tensors in flight behind a busy stream, freed at once; slots are filled again as soon as they are free."""
    rank, transport, senders, receivers = join(token)
    with torch.cuda.stream(torch.cuda.Stream()) if rank == 0 else torch.no_grad():
        for tag in range(rounds):
            if rank == 0:
                value = torch.full((SIZE,), float(tag), device=DEVICES[0])
                torch.cuda._sleep(10_000_000)
                value += 1
                send(senders["0>1"], tag, (value, torch.tensor(tag)))
                del value
                torch.full((SIZE,), -1.0, device=DEVICES[0])  # takes its memory if the allocator thinks it free
                got = receivers["1>0"].recv(tag).value
                assert not got.is_cuda and receivers["1>0"].owns(got.data_ptr())
                torch.cuda._sleep(10_000_000)
                moved = got.to(DEVICES[0], non_blocking=True)
                del got  # the stream has not read it yet
                assert moved.sum().item() == SIZE * (tag + 2.0)
            else:
                value, number = receivers["0>1"].recv(tag).value
                assert number == tag and (value == tag + 1.0).all()
                send(senders["1>0"], tag, value + 1)
                del value
    transport.close()


def test_there_and_back() -> None:
    values(launch(there_and_back, 2, secrets.token_hex(16), 20, timeout=100.0))


def killed(token: str, victim: int) -> str:
    rank, transport, _, receivers = join(token)
    barrier("open")
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerDied) as caught:
        receivers[f"{victim}>{rank}"].recv(0)
    transport.close()
    return str(caught.value)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_on_either_side(victim: int) -> None:
    outcomes = launch(killed, 2, secrets.token_hex(16), victim, timeout=100.0)
    assert f"rank {victim}" in outcomes[1 - victim].value


def of_both_kinds(kinds: list[str], devices: list[str], transport: str) -> list[float]:
    if transport == "auto" and os.environ["WORLD_SIZE"] == "1":
        del os.environ["RANK"]
    return [difference(kind, devices, transport=transport) for kind in kinds]


@pytest.mark.parametrize("devices", [["cuda:0", "cpu"], ["cpu", "cuda:0"], ["cuda:0", "cpu", "cuda:0"]])
@pytest.mark.parametrize("ranks", [len, lambda _: 1], ids=["processes", "one-process"])
def test_training_equals_the_unsplit_module(devices: list[str], ranks: Callable[[list[str]], int]) -> None:
    kinds = ["plain", "skip"] if ranks(devices) == 1 else ["plain", "tied", "skip"]
    for found in values(launch(of_both_kinds, ranks(devices), kinds, devices, "auto", timeout=100.0)):
        assert max(found) < 1e-12
