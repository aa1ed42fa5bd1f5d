"""Batches: split into micro-batches, joined again, measured and compared."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from pipekern.errors import ConfigError
from pipekern.stage.random import mix
from pipekern.transport.value import distinct, map_places, map_tensors, moved, tensors


def batch_size(value: Any, name: str) -> int:
    """Samples in ``value``: the first dimension of its tensors, which must agree. Raises ``ConfigError``."""
    sizes = {t.shape[0] for t in tensors(value) if t.ndim > 0}
    if len(sizes) > 1:
        raise ConfigError(
            f"{name} has tensors with {' and '.join(map(str, sorted(sizes)))} samples; the first dimension of every "
            "tensor is the batch: expand the smaller ones, or keep constants in the model"
        )
    if not sizes:
        raise ConfigError(f"{name} has no tensor with a batch dimension: there is nothing to split into micro-batches")
    return sizes.pop()


def split(value: Any, microbatches: int, name: str) -> list[Any]:
    """``microbatches`` parts of ``value``, views of its tensors along the first dimension, as equal as possible.

    The first parts are one sample larger where it does not divide. A tensor that stands in several places of ``value``
    does so in every part. Values that are not tensors, and tensors without dimensions, go to every part. Raises
    ``ConfigError`` where there are fewer samples than micro-batches.
    """
    size = batch_size(value, name)
    if size < microbatches:
        raise ConfigError(
            f"{name} has {size} samples for {microbatches} micro-batches; every micro-batch needs at least one: "
            f"give a batch of at least {microbatches}, or set microbatches={size}"
        )
    if isinstance(value, torch.Tensor):
        return list(value.tensor_split(microbatches))
    pieces = {id(t): t.tensor_split(microbatches) for t in distinct(tensors(value)) if t.ndim > 0}
    return [
        map_tensors(lambda t, i=i: pieces[id(t)][i] if t.ndim > 0 else t, value)  # type: ignore[misc]
        for i in range(microbatches)
    ]


def sizes(size: int, microbatches: int) -> list[int]:
    """Samples of each micro-batch, as :func:`split` makes them."""
    small, larger = divmod(size, microbatches)
    return [small + 1] * larger + [small] * (microbatches - larger)


def join(parts: Sequence[Any]) -> Any:
    """The outputs of all micro-batches as one, tensors concatenated along the first dimension (0-d ones stacked).

    What is not a tensor is the first micro-batch's. Raises ``ConfigError`` for objects that may hide tensors, unless
    they are the same one in every micro-batch.
    """
    unknown: list[list[Any]] = [[] for _ in parts]
    columns = zip(*(tensors(part, other.append) for part, other in zip(parts, unknown, strict=True)), strict=True)
    for row in zip(*unknown, strict=True):
        if any(item is not row[0] for item in row):
            raise ConfigError(
                f"the outputs hold a {type(row[0]).__module__}.{type(row[0]).__qualname__} a micro-batch, which cannot "
                "be joined: return tensors in tuples, lists, dicts, named tuples or dataclasses"
            )
    joined = iter([torch.stack(column) if column[0].ndim == 0 else torch.cat(column) for column in columns])
    return map_places(lambda _: next(joined), parts[0])


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``, each a leaf that requires a gradient if it did; what is on the CPU and
    stays there as it is.
    """
    if device.type == "cpu" and all(tensor.is_cpu for tensor in tensors(value)):
        return value
    return map_tensors(lambda t: _move_leaf(t, device), value)


def _move_leaf(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return moved(tensor.detach(), device).requires_grad_(tensor.requires_grad)


def digest(*values: Any) -> int:
    """A 63-bit number of the tensors' bytes and shapes, never 0; equal on ranks with equal batches.

    By the extension's hash at memory speed, or by BLAKE2 where it is not built: ranks check at the start that they
    agree.
    """
    state = len(values)
    for tensor in tensors(values):
        tensor = tensor.detach().cpu().contiguous()
        state = mix(state, *tensor.shape, tensor.itemsize, _hash(tensor.data_ptr(), tensor.nbytes))
    return state or 1


def _hash(pointer: int, nbytes: int) -> int:
    try:
        from pipekern._C import digest as hash_memory
    except ImportError:
        memory = (ctypes.c_char * nbytes).from_address(pointer) if nbytes else b""
        return int.from_bytes(hashlib.blake2b(memory, digest_size=8).digest(), "little")
    return hash_memory(pointer, nbytes, 0)
