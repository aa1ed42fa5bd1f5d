"""torch's DistributedDataParallel and FSDP2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.pipelines.case import Case
from benchmarks.zero.contender import Contender, Start, held


class Replicated:
    """DistributedDataParallel. ``once``: gradients are summed once a step, else after each micro-batch."""

    def __init__(self, case: Case, contender: Contender, once: bool):
        self._case, self._once = case, once
        self._model = DistributedDataParallel(case.model(1), gradient_as_bucket_view=True)
        self._optimizer = case.optimizer(self._model.parameters(), **case.options)

    def step(self) -> float:
        m, loss = self._case.microbatches, 0.0
        for i, (x, y) in enumerate(zip(self._case.x.chunk(m), self._case.y.chunk(m), strict=True)):
            with self._accumulating(last=i + 1 == m):
                part = self._case.loss_fn(self._model(x), y) / m
                part.backward()
            loss += float(part.detach())
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def _accumulating(self, last: bool) -> AbstractContextManager[None]:
        return self._model.no_sync() if self._once and not last else nullcontext()

    def memory(self) -> Mapping[str, Iterable[Tensor]]:
        return held(self._model.parameters(), self._optimizer)

    def close(self) -> None:
        """Nothing outlives the object."""


class Sharded:
    """``fully_shard`` on each layer and on the model. ``reshard``: weights are given back after each forward. ``once``:
    gradients are summed once a step. ``kept``: weights stay whole from the first micro-batch to the last.
    """

    def __init__(self, case: Case, contender: Contender, reshard: bool, once: bool, kept: bool = False):
        self._case, self._once, self._kept = case, once, kept
        mesh = init_device_mesh("cpu", (2,))
        policy = MixedPrecisionPolicy(torch.bfloat16 if contender.precision else None, torch.float32)
        self._model = case.model(1)
        for layer in self._model:
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
        fully_shard(self._model, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
        self._optimizer = case.optimizer(self._model.parameters(), **case.options)

    def step(self) -> float:
        model = self._model
        assert isinstance(model, FSDPModule)
        m, loss = self._case.microbatches, 0.0
        for i, (x, y) in enumerate(zip(self._case.x.chunk(m), self._case.y.chunk(m), strict=True)):
            last = i + 1 == m
            model.set_requires_gradient_sync(last or not self._once)
            model.set_reshard_after_backward(last or not self._kept)
            part = self._case.loss_fn(self._model(x).float(), y) / m
            part.backward()
            loss += float(part.detach())
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def memory(self) -> Mapping[str, Iterable[Tensor]]:
        return held(self._model.parameters(), self._optimizer)

    def close(self) -> None:
        """Nothing outlives the object."""


def contenders() -> dict[Contender, Start]:
    """What shares nothing out, and FSDP2 with its settings for several micro-batches."""
    found: dict[Contender, Start] = {}
    for once in (False, True):
        way = "DDP, no_sync" if once else "DDP, a sum a micro-batch"
        found[Contender("torch", way, 0, None)] = partial(Replicated, once=once)
    for precision in (None, "bf16"):
        for reshard in (True, False):
            for once in (False, True):
                way = f"FSDP2, reshard={reshard}, a sum a {'step' if once else 'micro-batch'}"
                contender = Contender("torch", way, 3 if reshard else 2, precision)
                found[contender] = partial(Sharded, reshard=reshard, once=once)
        contender = Contender("torch", "FSDP2, whole during a step, a sum a step", 3, precision)
        found[contender] = partial(Sharded, reshard=False, once=True, kept=True)
    return found
