"""What benchmarks/transport_gpu.py times in one process: products beside a parked stream, casts on the way."""

from __future__ import annotations

import ctypes
import secrets
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipekern.transport.base import Link
from pipekern.transport.cuda import CudaTransport

CARD = torch.device("cuda", 0)
BYTES = 64 << 20  # of a message
MESSAGES = 24  # of one measurement; as many slots where nothing is received meanwhile


def timed(work: Callable[[], object]) -> float:
    """Seconds on the device from before ``work`` to after what it has queued in the current stream."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    work()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def value_of(receiver: Any, tag: int) -> Any:
    message = receiver.recv(tag)
    assert message is not None
    return message.value


def send(sender: Any, tag: int, value: Any, given: bool = True) -> None:
    while not sender.send(tag, value, given=given):
        time.sleep(0)


def park(stream: torch.cuda.Stream) -> Callable[[], None]:
    """Make ``stream`` wait on the device; returns what lets it go, by a write of the host."""
    flag = torch.zeros(1, dtype=torch.int64, pin_memory=True)
    wait = ctypes.CDLL("libcuda.so.1").cuStreamWaitValue64_v2
    wait.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint]
    result = wait(stream.cuda_stream, flag.data_ptr(), 1, 0)
    if result:
        raise SystemExit(f"cuStreamWaitValue64 fails with {result}")

    def release() -> None:
        flag.fill_(1)

    return release


def parked_turns() -> dict[str, Callable[[], float]]:
    left, right = (torch.randn(8192, 8192, device=CARD, dtype=torch.bfloat16) for _ in range(2))
    stream = torch.cuda.Stream()

    def products() -> float:
        left @ right
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        for _ in range(20):
            left @ right
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3 / 20

    def parked() -> float:
        torch.cuda.synchronize()
        release = park(stream)
        seconds = products()
        release()
        return seconds

    return {"product": products, "product parked": parked}


def cast_turns() -> dict[str, Callable[[], float]]:
    """Puts within one process whose sending stream waits for them: so they can be timed in it."""
    links = [Link(codec, 0, 1, MESSAGES, codec) for codec in ("none", "bf16", "fp8")]
    transport = CudaTransport(None, 2, secrets.token_hex(16), 60.0, lambda: None, [CARD] * 2)
    senders, receivers = transport.open(links)
    floats = torch.randn(BYTES // 4, device=CARD)
    halves = torch.randn(BYTES // 2, device=CARD, dtype=torch.bfloat16)

    def sends(codec: str, value: Callable[[], Tensor]) -> float:
        def all_of_them() -> None:
            for tag in range(MESSAGES):
                send(senders[codec], tag, value(), given=False)

        seconds = timed(all_of_them) / MESSAGES
        for tag in range(MESSAGES):
            value_of(receivers[codec], tag)
        torch.cuda.synchronize()
        return seconds

    return {
        "fused": lambda: sends("bf16", lambda: floats),
        "cast then put": lambda: sends("none", floats.bfloat16),
        "pack": lambda: sends("fp8", lambda: halves),
    }
