"""The loss over micro-batches: what one of them counts, so that the sum is the mean over the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.nn.cross_entropy import CrossEntropyLoss
from pipekern.runtime.head_loss import HeadLoss
from pipekern.stage.head import Head
from pipekern.transport.value import map_tensors

_BY_TARGET = (nn.CrossEntropyLoss, CrossEntropyLoss, nn.NLLLoss)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Verdict(NamedTuple):
    """What the last stage tells all ranks of a step: ``total``, the weighted sum of its losses, 0-d float64, None for
    an evaluation without targets; their ``dtype``; and, where the loss is a pair (sum, count), the ``counted``, by
    which every gradient must still be divided.
    """

    total: Tensor | None
    dtype: torch.dtype = torch.float32
    counted: Tensor | None = None

    @property
    def loss(self) -> Tensor | None:
        """Of the batch, 0-d."""
        if self.total is None:
            return None
        return (self.total if self.counted is None else self.total / self.counted).to(self.dtype)

    @property
    def divisor(self) -> float | None:
        return None if self.counted is None else float(self.counted)

    def encode(self) -> Tensor:
        """Four float64 numbers for a message, on the device of the loss, which is not waited for."""
        kind = -1 if self.total is None else _DTYPES.index(self.dtype)
        numbers = torch.tensor([0.0, kind, self.counted is not None, 1.0], dtype=torch.float64)
        if self.total is not None:
            numbers = numbers.to(self.total.device, non_blocking=True)
            numbers[0] = self.total
        if self.counted is not None:
            numbers[3] = self.counted
        return numbers

    @classmethod
    def decode(cls, numbers: Tensor) -> Verdict:
        """The verdict that :meth:`encode` wrote."""
        total, kind, late, count = numbers.cpu()
        if kind < 0:
            return cls(None)
        return cls(total, _DTYPES[int(kind)], count if late else None)

    @classmethod
    def over(cls, replicas: Sequence[Verdict]) -> Verdict:
        """The verdict on the batch of all ``replicas``, added in their order."""
        first = replicas[0]
        if first.total is None:
            return first
        totals = torch.stack([one.total for one in replicas if one.total is not None])
        counts = [one.counted for one in replicas if one.counted is not None]
        return cls(totals.sum(), first.dtype, torch.stack(counts).sum() if counts else None)


class Loss:
    """``loss_fn`` over one batch of micro-batches. With ``low_precision`` it gets what the model gives in float32.

    Three rules, chosen by what ``loss_fn`` is: a mean over targets (``nn.CrossEntropyLoss``, ``nn.NLLLoss``) is summed
    and divided by the weight of all targets that are not ignored; a pair (sum, count) is divided by the count of the
    whole batch, known only at the end; any other scalar counts by its samples, or as it is where its ``reduction`` is
    ``"sum"``. With a ``head`` it is given that layer's input in place of the output.
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Any], head: Head | None = None, low_precision: bool = False):
        self.loss_fn = loss_fn
        self._call = loss_fn
        self.scale = 1.0
        self._by_target: nn.Module | None = None
        self._summed = getattr(loss_fn, "reduction", "mean") == "sum"
        if type(loss_fn) in _BY_TARGET and loss_fn.reduction == "mean":  # type: ignore[attr-defined]
            self._by_target = loss_fn  # type: ignore[assignment]
            self._call = copy.copy(loss_fn)
            self._call.reduction = "sum"  # type: ignore[attr-defined]
        self.takes: Callable[[Any], Any] = widened if low_precision else lambda output: output
        self._of_head = None if head is None else HeadLoss(head, self._call, self.takes)

    def start(
        self,
        targets: Sequence[Any],
        sizes: Sequence[int],
        scale: float = 1.0,
        over_replicas: Callable[[float], float] = float,
    ) -> None:
        """Begin a batch: ``targets`` by micro-batch, none where there is no loss to compute, and their ``sizes`` in
        samples. Gradients are multiplied by ``scale``; ``over_replicas`` adds a number up over all replicas.
        """
        self.scale = scale
        self._values: list[Tensor] = []
        self._factors: list[float] = []
        self._counts: list[Tensor] = []
        if not targets:
            return
        if self._by_target is not None:
            total = over_replicas(sum(_target_weight(self._by_target, target) for target in targets))
            self._weights = [1.0 / total if total else 0.0] * len(sizes)
        elif self._summed:
            self._weights = [1.0] * len(sizes)
        else:
            total = over_replicas(sum(sizes))
            self._weights = [size / total for size in sizes]

    def forward(self, microbatch: int, output: Any, target: Any) -> tuple[Tensor, float]:
        """The scalar to go backward from, and the gradient that it starts with."""
        if self._of_head is not None:
            loss: Any = self._of_head(output, target, self._weights[microbatch] * self.scale)
        else:
            loss = self._call(self.takes(output), target)
        if isinstance(loss, tuple):
            loss, weight = self._pair(loss), 1.0
        else:
            weight = self._weights[microbatch]
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(
                f"loss_fn returned {shape}; a loss is one number, or a pair (sum, count): reduce it, for instance by "
                ".mean()"
            )
        loss = loss.reshape(())
        self._values.append(loss.detach())
        self._factors.append(weight)
        return loss, weight * self.scale

    def _pair(self, pair: tuple[Any, ...]) -> Tensor:
        if len(pair) != 2:
            raise ConfigError(f"loss_fn returned {len(pair)} values; a loss is one number, or a pair (sum, count)")
        total, count = pair
        self._counts.append(torch.as_tensor(count, dtype=torch.float64).detach())
        return total

    def result(self) -> Verdict:
        """The verdict on the batch so far."""
        if not self._values:
            return Verdict(None)
        values = torch.stack(self._values)
        factors = torch.tensor(self._factors, dtype=torch.float64).to(values.device, non_blocking=True)
        total = torch.dot(values.double(), factors)
        if not self._counts:
            return Verdict(total, values.dtype)
        return Verdict(total, values.dtype, torch.stack(self._counts).sum())


def widened(value: Any) -> Any:
    """``value`` with its 16-bit floats in float32."""
    return map_tensors(lambda t: t.float() if t.is_floating_point() and t.itemsize < 4 else t, value)


def _target_weight(loss_fn: nn.Module, target: Tensor) -> float:
    """What the mean of ``loss_fn`` divides by, for one micro-batch: the weights of targets that are not ignored."""
    weight: Tensor | None = loss_fn.weight  # type: ignore[assignment]
    if target.is_floating_point():
        return float(target.numel() // target.shape[1 if target.ndim > 1 else 0])
    kept = target[target != loss_fn.ignore_index]
    return float(kept.numel() if weight is None else weight.double()[kept.to(weight.device)].sum())
