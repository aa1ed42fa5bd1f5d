"""The unsplit model in low precision, with float32 main gradients and masters: plain torch, nothing of pipekern."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.runtime import reference
from tests.runtime.models import Batch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Low:
    """``model``, float32, as ``masters``, and its copy in ``dtype``, which runs micro-batch by micro-batch over the
    replicas in turn. Layers with running statistics stay as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        dtype: torch.dtype,
        microbatches: int,
        scale: float,
    ):
        self.masters, self.model = model, copy.deepcopy(model)
        self._loss_fn, self._dtype, self._microbatches, self._scale = loss_fn, dtype, microbatches, scale
        for module in self.model.modules():
            for p in module.parameters(recurse=False):
                if not isinstance(module, _BatchNorm):
                    p.data = p.data.to(dtype)
                    p.grad_dtype = torch.float32

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """Gradients of the mean loss into those of the masters; sums of replicas are added up last."""
        with torch.no_grad():
            for p, master in zip(self.model.parameters(), self.masters.parameters(), strict=True):
                p.copy_(master)
        total = torch.zeros((), dtype=torch.float64)
        samples = sum(len(batch.y) for batch in batches)
        sums: list[Tensor | None] = [None] * len(list(self.masters.parameters()))
        for batch in batches:
            self.model.zero_grad()
            parts = [reference.split(value, self._microbatches) for value in batch]
            for x, y in zip(*parts, strict=True):
                weight = len(y) / samples
                loss = self._loss(x, y)
                loss.backward(torch.tensor(weight * self._scale))
                total += loss.detach().double() * weight
            own = [p.grad for p in self.model.parameters()]
            sums = [b if a is None else a + b for a, b in zip(sums, own, strict=True)]  # type: ignore[operator]
        for master, grad in zip(self.masters.parameters(), sums, strict=True):
            assert grad is not None and grad.dtype is torch.float32
            grad = grad / self._scale
            master.grad = grad if master.grad is None else master.grad + grad
        return total

    def _loss(self, x: Any, y: Any) -> Tensor:
        output = self.model(x.to(self._dtype) if x.is_floating_point() else x)
        if isinstance(output, Tensor):
            return self._loss_fn(output.float(), y)
        output.logits = output.logits.float()
        return self._loss_fn(output, y)

    def gradients(self) -> dict[str, Any]:
        return reference.gradients(self.masters)

    def weights(self) -> dict[str, Any]:
        return {name: p.detach().clone() for name, p in self.masters.named_parameters(remove_duplicate=False)}


def difference(got: dict[str, Any], want: dict[str, Any]) -> float:
    """The largest of any tensor, divided by the largest entry of any."""
    largest = max(float(value.abs().max()) for value in want.values())
    return reference.distance(got, want) / largest
