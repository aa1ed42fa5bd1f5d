"""What goes between the replicas of a stage: asynchronous sums, scatters and gathers of one flat memory.

On torch.distributed, over a group of its own. A wait looks at the job while it waits, so that it ends when a rank dies
or fails, and no call blocks within the library for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipekern.errors import TransportError

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_SLICE = 0.001  # seconds between two looks at the job
_GRACE = 1.0  # seconds until it is known who broke a connection


class Pending:
    """A collective under way, ``on_device`` in its streams. ``started``, and ``ended``, when it was first seen to have,
    are on the clock of ``perf_counter_ns``.
    """

    def __init__(
        self, work: Any, what: str, on_device: bool, check: Callable[[], None], then: Callable[[], object] | None
    ):
        self.what, self.started, self.ended = what, time.perf_counter_ns(), 0
        self._work, self._on_device, self._check, self._then = work, on_device, check, then

    def done(self) -> bool:
        """Whether it has ended; on a GPU, whether its work is."""
        if not self.ended and self._work.is_completed():
            self.ended = time.perf_counter_ns()
        return bool(self.ended)

    def wait(self) -> None:
        """Until the result is there: on a GPU the current stream waits, and not the host. Raises what happens to the
        job meanwhile.
        """
        if self._work is None:
            return
        pause = 0.00002
        try:
            while not self._on_device and not self.done():
                self._check()
                time.sleep(pause)
                pause = min(2 * pause, _SLICE)
            self._work.wait()
        except RuntimeError as error:
            self._blame()
            raise TransportError(f"{self.what} failed: {error}") from error
        if self._then is not None:
            self._then()
            self._then = None
        if self.ended:
            self._work = None  # it holds the memory of what was sent and of what came

    def _blame(self) -> None:
        """Raise what has happened to the job: a broken connection is seen before it is known whose end it was."""
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            self._check()
            time.sleep(_SLICE)


class Replicas:
    """This process among the ``size`` replicas of its stages; ``index`` counts it. ``check`` raises what has happened
    to the job. ``sent`` counts the bytes that a ring of so many sends from here, by kind.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        index: int,
        size: int,
        check: Callable[[], None],
        between: str = "the replicas of a stage",
    ):
        self.index, self.size, self._between = index, size, between
        self.sent = {"reduce": 0, "gather": 0}
        self._group, self._check = group, check

    def watch(self, check: Callable[[], None]) -> None:
        """From now on look at the job by ``check``."""
        self._check = check

    def sum(self, values: Tensor) -> Pending:
        """Add ``values`` of all replicas in place."""
        self.sent["reduce"] += 2 * self._share(values)
        return self._pending(dist.all_reduce(values, group=self._group, async_op=True), "a sum", values)

    def scatter(self, values: Tensor, own: Tensor) -> Pending:
        """The sum of all replicas' ``values``, of which replica i gets the i-th equal part, into ``own``."""
        self.sent["reduce"] += self._share(values)
        if values.is_cuda:
            return self._pending(
                _reduce_scatter(own, values, group=self._group, async_op=True), "a sum of parts", values
            )
        parts = torch.empty_like(values)  # gloo's own is a blocking call; this sends as much, and adds in order
        work = dist.all_to_all_single(parts, values, group=self._group, async_op=True)
        rows = parts.view(self.size, -1)
        return self._pending(work, "a sum of parts", values, lambda: torch.sum(rows, 0, out=own))

    def gather(self, values: Tensor) -> Pending:
        """All replicas' parts into ``values``, whose own part is there."""
        self.sent["gather"] += self._share(values)
        own = values.tensor_split(self.size)[self.index]
        return self._pending(_all_gather(values, own, group=self._group, async_op=True), "a gather", values)

    def equalise(self, values: Tensor) -> None:
        """Take the first replica's ``values``, of any dtype and layout."""
        flat = values.reshape(-1).clone().view(torch.uint8)
        work = dist.broadcast(flat, group=self._group, group_src=0, async_op=True)
        self._pending(work, "a broadcast", flat).wait()
        if self.index:
            values.copy_(flat.view(values.dtype).view(values.shape))

    def _share(self, values: Tensor) -> int:
        return values.nbytes * (self.size - 1) // self.size

    def _pending(self, work: Any, what: str, values: Tensor, then: Callable[[], object] | None = None) -> Pending:
        return Pending(work, f"{what} between {self._between}", values.is_cuda, self._check, then)


def speed(replicas: Replicas, device: torch.device, repeats: int = 3) -> tuple[float, float]:
    """(latency in seconds, bytes a second) of a sum between the replicas, the best of ``repeats``; collective."""
    times = []
    for count in (1, 1 << 20):
        values = torch.zeros(count, device=device)
        best = float("inf")
        for _ in range(repeats + 1):
            start = time.perf_counter()
            replicas.sum(values).wait()
            float(values[0])  # on a GPU the wait is the stream's
            best = min(best, time.perf_counter() - start)
        times.append(best)
    replicas.sent.update(reduce=0, gather=0)
    return times[0], (1 << 22) / max(times[1] - times[0], 1e-9)
