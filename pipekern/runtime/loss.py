"""The loss over micro-batches: what one of them counts, so that the sum is the mean over the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from pipekern.errors import ConfigError
from pipekern.nn.cross_entropy import CrossEntropyLoss
from pipekern.runtime.head_loss import HeadLoss
from pipekern.stage.head import Head

_BY_TARGET = (nn.CrossEntropyLoss, CrossEntropyLoss, nn.NLLLoss)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Verdict(NamedTuple):
    """What the last stage tells all ranks of a step.

    ``loss`` of the batch, 0-d, None for an evaluation without targets; and what every gradient must still be divided
    by, where the loss is a pair (sum, count).
    """

    loss: torch.Tensor | None
    divisor: float | None = None

    def encode(self) -> torch.Tensor:
        """Four float64 numbers for a message."""
        loss, kind = (0.0, -1) if self.loss is None else (float(self.loss), _DTYPES.index(self.loss.dtype))
        divisor = 1.0 if self.divisor is None else self.divisor
        return torch.tensor([loss, kind, self.divisor is not None, divisor], dtype=torch.float64)

    @classmethod
    def decode(cls, numbers: torch.Tensor) -> Verdict:
        """The verdict that :meth:`encode` wrote."""
        loss, kind, late, divisor = numbers.tolist()
        there = None if kind < 0 else torch.tensor(loss, dtype=_DTYPES[int(kind)])
        return cls(there, divisor if late else None)


class Loss:
    """``loss_fn`` over one batch of micro-batches.

    Three rules, chosen by what ``loss_fn`` is: a mean over targets (``nn.CrossEntropyLoss``, ``nn.NLLLoss``) is summed
    and divided by the weight of all targets that are not ignored; a pair (sum, count) is divided by the count of the
    whole batch, known only at the end; any other scalar counts by its samples, or as it is where its ``reduction`` is
    ``"sum"``. With a ``head`` it is given that layer's input in place of the output.
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Any], head: Head | None = None):
        self.loss_fn = loss_fn
        self._call = loss_fn
        self._by_target: nn.Module | None = None
        self._summed = getattr(loss_fn, "reduction", "mean") == "sum"
        if type(loss_fn) in _BY_TARGET and loss_fn.reduction == "mean":  # type: ignore[attr-defined]
            self._by_target = loss_fn  # type: ignore[assignment]
            self._call = copy.copy(loss_fn)
            self._call.reduction = "sum"  # type: ignore[attr-defined]
        self._of_head = None if head is None else HeadLoss(head, self._call)

    def start(self, targets: Sequence[Any], sizes: Sequence[int]) -> None:
        """Begin a batch: ``targets`` by micro-batch, none where there is no loss to compute, and their ``sizes`` in
        samples.
        """
        self._values: list[torch.Tensor] = []
        self._factors: list[float] = []
        self._counts: list[torch.Tensor] = []
        if not targets:
            return
        if self._by_target is not None:
            total = sum(_target_weight(self._by_target, target) for target in targets)
            self._weights = [1.0 / total if total else 0.0] * len(sizes)
        elif self._summed:
            self._weights = [1.0] * len(sizes)
        else:
            self._weights = [size / sum(sizes) for size in sizes]

    def forward(self, microbatch: int, output: Any, target: Any) -> tuple[torch.Tensor, float]:
        """The scalar to go backward from, and the gradient that it starts with."""
        if self._of_head is not None:
            loss: Any = self._of_head(output, target, self._weights[microbatch])
        else:
            loss = self._call(output, target)
        if isinstance(loss, tuple):
            loss, weight = self._pair(loss), 1.0
        else:
            weight = self._weights[microbatch]
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ConfigError(
                f"loss_fn returned {shape}; a loss is one number, or a pair (sum, count): reduce it, for instance by "
                ".mean()"
            )
        loss = loss.reshape(())
        self._values.append(loss.detach())
        self._factors.append(weight)
        return loss, weight

    def _pair(self, pair: tuple[Any, ...]) -> torch.Tensor:
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
            return Verdict(total.to(values.dtype))
        divisor = torch.stack(self._counts).sum()
        return Verdict((total / divisor).to(values.dtype), float(divisor))


def _target_weight(loss_fn: nn.Module, target: torch.Tensor) -> float:
    """What the mean of ``loss_fn`` divides by, for one micro-batch: the weights of targets that are not ignored."""
    weight: torch.Tensor | None = loss_fn.weight  # type: ignore[assignment]
    if target.is_floating_point():
        return float(target.numel() // target.shape[1 if target.ndim > 1 else 0])
    kept = target[target != loss_fn.ignore_index]
    return float(kept.numel() if weight is None else weight.double()[kept.to(weight.device)].sum())
