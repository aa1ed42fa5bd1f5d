"""The CUDA transport on a GPU; test_contract.py and test_faults.py run on it too. Two ranks share the first device."""

from __future__ import annotations

import copy
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported at run time only

import pipekern as pk
from pipekern.errors import PeerDied, TransportError
from pipekern.transport.base import Link
from tests.launch import launch, values
from tests.transport.fake_cuda import ROOT
from tests.transport.test_cuda_casts import run as run_on_host
from tests.transport.test_cuda_casts import slot_for

pytest.importorskip("pipekern._C")
from pipekern.transport.cuda import CudaTransport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CARD = torch.device("cuda", 0)
KEPT = 64 << 20  # bytes that torch and the driver keep of their own
LINKS = [Link("0>1", 0, 1, 2), Link("1>0", 1, 0, 2)]


def barrier(name: str) -> None:
    meeting, world = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False), 2
    if meeting.add(f"{name}/count", 1) == world:
        meeting.set(f"{name}/all", "here")
    meeting.wait([f"{name}/all"])


def join(token: str, wait: str = "auto", links: list[Link] = LINKS) -> Any:
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(CARD)
    transport = CudaTransport(rank, 2, token, 60.0, lambda: barrier("bound"), [CARD] * 2, wait)
    return rank, transport, *transport.open(links)


def alone(links: list[Link]) -> Any:
    transport = CudaTransport(None, 2, secrets.token_hex(16), 60.0, lambda: None, [CARD] * 2)
    return transport, *transport.open(links)


def value_of(receiver: Any, tag: int) -> Any:
    message = receiver.recv(tag)
    assert message is not None
    return message.value


def send(sender: Any, tag: int, value: Any, given: bool = False) -> None:
    while not sender.send(tag, value, given=given):
        time.sleep(0)


def streaming(token: str, wait: str, rounds: int) -> dict[str, str]:
    """Large tensors in flight on a stream of the user's own, freed at once, and computed with where they arrive."""
    rank, transport, senders, receivers = join(token, wait)
    size = 1 << 22
    with torch.cuda.stream(torch.cuda.Stream()):
        for tag in range(rounds):
            if rank == 0:
                value = torch.full((size,), float(tag), device=CARD)
                torch.cuda._sleep(100_000)
                value += 1
                send(senders["0>1"], tag, value, given=True)
                del value
                torch.full((size,), -1.0, device=CARD)  # takes its memory if the allocator thinks it free
                assert value_of(receivers["1>0"], tag).item() == size * (tag + 1.0)
            else:
                got = value_of(receivers["0>1"], tag)
                total = got.double().sum()
                del got
                send(senders["1>0"], tag, total)
    ways: dict[str, str] = transport.ways()
    transport.close()
    return ways


@pytest.mark.parametrize("wait", ["auto", "host"])
def test_two_processes_on_one_gpu(wait: str) -> None:
    rows = values(launch(streaming, 2, secrets.token_hex(16), wait, 30, timeout=100.0))
    assert [way for row in rows for way in row.values()] == ["ipc", "ipc"]


def test_expandable_segments() -> None:
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    values(launch(streaming, 2, secrets.token_hex(16), "auto", 10, timeout=100.0, environ=environ))


def parked(token: str) -> tuple[float, int]:
    free_before = torch.cuda.mem_get_info(CARD)[0]
    rank, transport, senders, receivers = join(token)
    if rank == 1:
        torch.cuda._sleep(2**40)  # announces a message behind work that does not end
        send(senders["1>0"], 0, torch.ones(1000, device=CARD), given=True)
        barrier("sent")
        os.kill(os.getpid(), signal.SIGKILL)
    barrier("sent")
    got = value_of(receivers["1>0"], 0)
    start = time.monotonic()
    assert got.isnan().all().item()  # parked until the death is known: and then nothing but NaN
    late = time.monotonic() - start
    del got
    with pytest.raises(PeerDied, match="rank 1") as caught:
        transport.check()
    assert caught.value.rank == 1
    transport.close()
    torch.cuda.empty_cache()
    deadline = time.monotonic() + 10  # for the driver to give back what the dead process had
    while free_before - torch.cuda.mem_get_info(CARD)[0] > KEPT and time.monotonic() < deadline:
        time.sleep(0.05)
    return late, free_before - torch.cuda.mem_get_info(CARD)[0]


def test_a_death_releases_a_parked_stream_and_memory_goes_back() -> None:
    survivor, victim = launch(parked, 2, secrets.token_hex(16), timeout=100.0)
    assert "signal 9" in (victim.error or "")
    late, kept = values([survivor])[0]
    assert late < 2.0
    assert kept <= KEPT


def model() -> nn.Module:
    torch.manual_seed(0)
    block = [layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.GELU())]
    return nn.Sequential(*block).to(CARD)


def train(processes: bool, schedule: str) -> float:
    """The largest difference to the unsplit module, relative to the step, after three steps."""
    net, loss_fn = model(), nn.MSELoss()
    reference = copy.deepcopy(net)
    options: dict[str, Any] = {} if processes else {"ranks": 2, "devices": [CARD]}
    pipe = pk.Pipeline(net, loss_fn=loss_fn, microbatches=8, schedule=schedule, **options)
    assert pipe._parts.transport.name == ("cuda" if processes else "local")
    optimizers = [pipe.optimizer(torch.optim.SGD, lr=0.1), torch.optim.SGD(reference.parameters(), lr=0.1)]
    for _ in range(3):
        x, y = (torch.randn(64, 256, device=CARD) for _ in range(2))
        pipe.train_step(x, y)
        for part, target in zip(x.chunk(8), y.chunk(8), strict=True):
            (loss_fn(reference(part), target) / 8).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    there = dict(reference.named_parameters())
    start = dict(model().named_parameters())
    differences = [
        float(((p - there[n]).abs().max() / (there[n] - start[n]).abs().max()).detach())
        for n, p in pipe.named_parameters()
    ]
    pipe._parts.transport.close()
    return max(differences)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_training_equals_the_unsplit_module(schedule: str, ranks: int) -> None:
    assert max(values(launch(train, ranks, True, schedule, timeout=100.0))) < 1e-4


def test_training_in_one_process() -> None:
    environ = {"RANK": "", "WORLD_SIZE": ""}
    assert max(values(launch(train_alone, 1, "1f1b", timeout=100.0, environ=environ))) < 1e-4


def train_alone(schedule: str) -> float:
    del os.environ["RANK"], os.environ["WORLD_SIZE"]
    return train(False, schedule)


@pytest.mark.parametrize("codec", ["none", "bf16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [5, 128, 100_003, 1 << 20])
def test_kernels_are_the_host_bodies_bit_for_bit(codec: str, dtype: torch.dtype, count: int) -> None:
    transport, senders, receivers = alone([Link("0>1", 0, 1, 2, codec)])
    for shift in (0, 1):  # the second is not 16-byte aligned
        host = (torch.randn(count + shift) * torch.logspace(-6, 6, count + shift)).to(dtype)[shift:]
        value = torch.empty(count + shift, dtype=dtype, device=CARD)[shift:].copy_(host)
        expected = through_host(host.contiguous(), codec)
        send(senders["0>1"], 0, value)
        got = value_of(receivers["0>1"], 0)
        assert torch.equal(got.cpu(), expected)
        del got
        total = torch.ones(count, dtype=dtype, device=CARD)
        send(senders["0>1"], 1, value)
        assert receivers["0>1"].end.recv_into(1, total, -1.0, torch.cuda.current_stream().cuda_stream)
        assert torch.equal(total.cpu(), (expected.float() + 1).to(dtype))
    transport.close()


def through_host(value: torch.Tensor, codec: str) -> torch.Tensor:
    """What the link makes of ``value``, by the bodies that are compiled for the host."""
    name = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[value.dtype]
    if value.numel() < 128 or codec == "none" or (codec == "bf16" and name != "f32"):
        return value
    if codec == "bf16":
        return value.bfloat16().float()
    slot, back = slot_for(value.numel()), torch.empty_like(value)
    run_on_host(f"pk_put_{name}_e4m3", value, slot)
    run_on_host(f"pk_take_e4m3_{name}", back, slot)
    return back


def forks() -> str:
    transport, senders, _ = alone([Link("0>1", 0, 1, 2)])
    send(senders["0>1"], 0, torch.ones(3, device=CARD))
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            senders["0>1"].end.free(1)
        except TransportError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.wait()
    text = os.read(reading, 1000).decode()
    transport.close()
    return text


def test_a_forked_child_is_refused() -> None:
    assert "forked" in values(launch(forks, 1))[0]


def test_compute_sanitizer_finds_nothing() -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        pytest.skip("compute-sanitizer is not installed")
    test = "tests/transport/test_cuda_gpu.py::test_kernels_are_the_host_bodies_bit_for_bit"
    command = [
        sanitizer,
        "--error-exitcode=86",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-k",
        "100003",
        test,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
