"""The unsplit model, trained in plain torch: what a pipeline must equal. It uses nothing of pipekern."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LossFn = Callable[[Any, Any], Tensor]


def step(model: nn.Module, loss_fn: LossFn, x: Any, y: Any, microbatches: int = 1) -> Tensor:
    """Add the gradients of the batch's mean loss to ``.grad`` and return that loss, 0-d float64.

    The whole batch at once; with ``microbatches`` one after the other, the first ones a sample larger where it does not
    divide, each counting by its samples. ``x`` and ``y``: tensors, or any nesting of them and plain values.
    """
    total = torch.zeros((), dtype=torch.float64)
    for part, target in zip(split(x, microbatches), split(y, microbatches), strict=True):
        loss = loss_fn(model(part), target)
        if microbatches > 1:
            loss = loss * (samples(part) / samples(x))
        if loss.requires_grad:
            loss.backward()
        total += loss.detach()
    return total


def split(value: Any, microbatches: int) -> list[Any]:
    """The parts of a batch; what is not a tensor, or has no dimensions, goes to every part."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = split({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, microbatches)
        return [dataclasses.replace(value, **part) for part in parts]
    if isinstance(value, dict):
        columns = [split(item, microbatches) for item in value.values()]
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(value, tuple | list):
        make = getattr(value, "_make", type(value))
        return [make(row) for row in zip(*(split(item, microbatches) for item in value), strict=True)]
    if isinstance(value, Tensor) and value.dim() > 0:
        return list(value.tensor_split(microbatches))
    return [value] * microbatches


def samples(value: Any) -> int:
    """Samples in a batch: the length of its first tensor."""
    if isinstance(value, Tensor):
        return len(value)
    if dataclasses.is_dataclass(value):
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    items = value.values() if isinstance(value, dict) else value
    return next(samples(item) for item in items if item is not None and not isinstance(item, int | float | str))


@torch.no_grad()
def evaluate(model: nn.Module, *x: Any) -> Any:
    """The outputs in evaluation mode; the model's mode and state stay as they are."""
    modes = {module: module.training for module in model.modules()}
    outputs = model.eval()(*x)
    for module, mode in modes.items():
        module.training = mode
    return outputs


def gradients(model: nn.Module) -> dict[str, Any]:
    """Copies of all gradients, a tied weight under each of its names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: None if p.grad is None else p.grad.clone() for name, p in named}


def distance(got: dict[str, Any], want: dict[str, Any]) -> float:
    """The largest difference between equally named tensors; the names must be the same, and so must what is None."""
    assert got.keys() == want.keys(), f"names differ: {sorted(got.keys() ^ want.keys())}"
    largest = 0.0
    for name, value in want.items():
        assert (got[name] is None) == (value is None), f"{name} is {got[name]}, wanted {value}"
        if value is not None and value.numel():
            assert got[name].shape == value.shape, name
            assert got[name].dtype == value.dtype, name
            difference = (got[name].double() - value.double()).abs().max().item()
            largest = max(largest, difference if difference == difference else float("inf"))
    return largest
