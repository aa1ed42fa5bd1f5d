# ruff: noqa: N999
"""Types of the compiled part: csrc/bindings."""

from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal

from torch import Tensor

from pipekern.transport.base import Message

class Job:
    """One rank's membership in a job."""

    def __init__(self, rank: int, world: int, token: str, timeout: float) -> None: ...
    def connect(self) -> None: ...
    def check(self) -> None: ...
    def abort(self, text: str) -> None: ...
    def close(self) -> None: ...

class Sender:
    """The sending end of a link."""

    def __init__(self, job: Job, number: int, name: str, target: int, slots: int) -> None: ...
    def free(self, tag: int) -> bool: ...
    def send_tensor(self, tag: int, tensor: Tensor, requires_grad: bool, digest: int) -> bool | None:
        """True: sent. False: no free slot. None: cannot be copied as it stands, or its shape does not fit a header."""

    def send_bundle(self, tag: int, descriptor: bytes, tensors: Sequence[tuple[int, int]], digest: int) -> bool:
        """``tensors``: pointer and size in bytes of each."""

    def send_bytes(self, tag: int, data: object) -> bool:
        """``data``: anything with the buffer protocol, contiguous."""

class Arrival:
    """A bundle in its slot, which is free again when this and all views are gone."""

    def view(self, offset: int, dtype: int, shape: Sequence[int]) -> Tensor:
        """A tensor in the payload; ``dtype`` is a place in ``message.DTYPES``."""

class Receiver:
    """The receiving end of a link."""

    def __init__(self, job: Job, number: int, name: str, source: int, slots: int) -> None: ...
    def ready(self) -> bool: ...
    def recv(self, tag: int, wait: float) -> Message | tuple[Arrival, bytes, int] | None:
        """A message of one tensor, or of a bundle (arrival, descriptor, digest).

        ``wait`` in seconds, negative: no limit.
        """

    def recv_bytes(self, tag: int, wait: float) -> bytes | None: ...
    def held(self) -> list[tuple[int, ...] | bytes]:
        """Of each message still in its slot: a tensor's shape, or a bundle's descriptor."""

    def owns(self, pointer: int) -> bool: ...

class Codec(Enum):
    NONE = ...
    BF16 = ...
    FP8 = ...

class Context:
    """The primary context of the CUDA device of this ordinal."""

    def __init__(self, device: int) -> None: ...

class Steward:
    """The thread that serves a job's CUDA links."""

    def __init__(self, job: Job) -> None: ...

class DeviceSender:
    """The sending end of a link between CUDA devices."""

    def __init__(
        self,
        job: Job,
        steward: Steward,
        number: int,
        name: str,
        target: int,
        slots: int,
        codec: Codec,
        context: Context,
        wait_on_host: bool,
    ) -> None: ...
    def free(self, tag: int) -> bool: ...
    def send_tensor(
        self, tag: int, tensor: Tensor, requires_grad: bool, digest: int, stream: int, given: bool
    ) -> bool | None:
        """``stream``: the handle of the CUDA stream that the tensor is made in. Otherwise as ``Sender.send_tensor``."""

    def send_bundle(
        self,
        tag: int,
        descriptor: bytes,
        on_host: Sequence[tuple[int, int]],
        on_device: list[Tensor],
        digest: int,
        stream: int,
        given: bool,
    ) -> bool:
        """``on_host``: pointer and size in bytes of each."""

    def reap(self) -> int:
        """How many of the messages with tensors on the device have been read."""

    def way(self) -> str: ...
    def close(self) -> None: ...

class DeviceBundle:
    """A bundle in its slot, which is free again when this and all views are gone."""

    @property
    def host_start(self) -> int: ...
    def view_device(self, index: int, dtype: int, shape: Sequence[int]) -> Tensor: ...
    def view_host(self, offset: int, dtype: int, shape: Sequence[int]) -> Tensor: ...

class DeviceReceiver:
    """The receiving end of a link between CUDA devices; ``device``: DLPack's type and number of its memory."""

    def __init__(
        self,
        job: Job,
        steward: Steward,
        number: int,
        name: str,
        source: int,
        slots: int,
        codec: Codec,
        context: Context,
        wait_on_host: bool,
        device: tuple[int, int],
    ) -> None: ...
    def announced(self) -> bool:
        """Whether the next message is on its way, or there."""

    def ready(self) -> bool: ...
    def recv(self, tag: int, wait: float, stream: int) -> Message | tuple[DeviceBundle, bytes, int] | None:
        """As ``Receiver.recv``; the tensors may be used in ``stream``."""

    def drain(self, stream: int) -> None:
        """Take and forget every message that has been announced."""

    def recv_into(self, tag: int, tensor: Tensor, wait: float, stream: int) -> Message | Literal[False] | None:
        """``Message(tensor, 0)`` with the next message added to ``tensor``; False for one that cannot be, and stays."""

    def held(self) -> list[tuple[int, ...] | bytes]: ...
    def owns(self, pointer: int) -> bool: ...
    def close(self) -> None: ...

class StagedSender:
    """The sending end of a link from a CUDA device to a rank on the CPU."""

    def __init__(self, job: Job, number: int, name: str, target: int, slots: int, context: Context) -> None: ...
    def free(self, tag: int) -> bool: ...
    def send_tensor(
        self, tag: int, tensor: Tensor, requires_grad: bool, digest: int, stream: int, given: bool
    ) -> bool | None:
        """As ``DeviceSender.send_tensor``."""

    def send_bundle(
        self,
        tag: int,
        descriptor: bytes,
        tensors: Sequence[tuple[int, int, bool]],
        digest: int,
        stream: int,
        given: bool,
    ) -> bool:
        """``tensors``: pointer and size in bytes of each, and whether it is on the device."""

    def reap(self) -> int:
        """How many of the messages with tensors of the device have been read, in the order they were sent."""

    def close(self) -> None: ...

class StagedReceiver:
    """The receiving end of a link from a rank on the CPU to one on a CUDA device: tensors stay on the CPU."""

    def __init__(self, job: Job, number: int, name: str, source: int, slots: int, context: Context) -> None: ...
    def ready(self) -> bool: ...
    def recv(self, tag: int, wait: float, stream: int) -> Message | tuple[Arrival, bytes, int] | None:
        """As ``Receiver.recv``; a slot is free again after what ``stream`` has queued when the last view is gone."""

    def held(self) -> list[tuple[int, ...] | bytes]: ...
    def owns(self, pointer: int) -> bool: ...
    def close(self) -> None: ...

def cuda_obstacle() -> str:
    """Why this process cannot use CUDA; empty where it can."""

def cuda_driver() -> dict[str, Any]:
    """``version``, and of each device its name and whether streams can wait for memory."""

def cuda_kernels() -> str:
    """Where the kernels of the codecs come from, or why there are none."""

def peer_obstacle(device: int, peer: int) -> str:
    """Why ``device`` cannot reach the memory of ``peer``; empty where it can."""

def digest(pointer: int, bytes: int, seed: int) -> int:
    """A 64-bit digest of ``bytes`` bytes of memory at ``pointer``; not cryptographic."""

class StreamRule(Enum):
    ONE_F_ONE_B = ...
    ZB_H1 = ...
    ZB_H2 = ...

class StreamRank:
    first_start: int
    last_end: int
    busy: int
    held: int
    shrunk: int

def stream(
    rule: StreamRule,
    microbatches: int,
    forward: Sequence[int],
    backward: Sequence[int],
    weight: Sequence[int],
    comm: Sequence[int],
) -> list[StreamRank]: ...
def search(
    ranks: int,
    microbatches: int,
    chunks: int,
    cap: float,
    kept: float,
    cost: Sequence[Sequence[float]],
    latency: Sequence[float],
    makespan: bool,
    good_enough: tuple[float, float],
    work: int,
) -> tuple[list[bytes], float, float]: ...

class Lattice:
    """All cuts of a row of layers: ``pipekern.plan.lattice``'s, with integers as 16 bytes each, the lowest first."""

    def __init__(
        self,
        steps: Sequence[Sequence[Sequence[tuple[int, int]]]],
        left: Sequence[Sequence[bytes]],
        done: bytes,
        cuts: bytes,
        factors: bytes,
        held: Sequence[bytes],
        caps: bytes,
        least_cuts: bytes,
    ) -> None: ...
    def cheapest(
        self, windows: Sequence[Sequence[tuple[int, int]]], limit: bytes, budget: bytes
    ) -> tuple[list[int], list[int], bytes] | None:
        """(bounds, devices, total); None where no cut has stages of at most ``limit`` and a total below ``budget``."""

class Pool:
    """``pipekern.plan.pool``'s, with integers as 16 bytes each, the lowest first."""

    def __init__(
        self,
        parts: int,
        counts: Sequence[int],
        done: bytes,
        cuts: bytes,
        factors: bytes,
        held: Sequence[bytes],
        caps: bytes,
    ) -> None: ...
    def reaches(self, limit: bytes) -> tuple[bool, bytes]: ...
    def least_total(self, limit: bytes, budget: bytes) -> bytes: ...
    def cheapest(
        self, limit: bytes, budget: bytes, width: int
    ) -> tuple[tuple[list[int], list[int], bytes] | None, bytes]:
        """((bounds, kinds, total), least)."""
