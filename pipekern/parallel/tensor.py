"""Tensors of which a process has a part: DTensors over the tensor-parallel parts of a stage, and their memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pipekern.parallel.replicas import Replicas


class Parts(Replicas):
    """This process among the ``size`` tensor-parallel parts of its stages; ``mesh`` is theirs."""

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, index: int, size: int, check: Callable[[], None]
    ):
        super().__init__(group, index, size, check, "the parts of a stage")
        self.mesh = DeviceMesh.from_group(group, device.type, mesh_dim_names=("tp",))


def settled(value: Tensor) -> Tensor:
    """``value``, once the collective that makes it has ended: torch lets such a tensor go on and waits at its use."""
    return value.wait() if isinstance(value, AsyncCollectiveTensor) else value


def local(tensor: Tensor) -> Tensor:
    """What this process has of ``tensor``: of a DTensor the memory itself, else all."""
    return settled(tensor._local_tensor) if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, without a gradient; for a DTensor in shards a collective, which makes a copy."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor().detach()


def part_of(like: Tensor, value: Tensor) -> Tensor:
    """Of ``value``, which is as large as all of ``like``, what this process would have; not collective."""
    if not isinstance(like, DTensor):
        return value
    return local(distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None))


def as_part(like: Tensor, values: Tensor) -> Tensor:
    """``values`` as what this process has of a tensor like ``like``."""
    if not isinstance(like, DTensor):
        return values
    return DTensor.from_local(
        values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def room(tensor: Tensor) -> int:
    """The most numbers that any part has of ``tensor``: torch gives the first ones the larger parts."""
    shape = list(tensor.shape)
    if isinstance(tensor, DTensor):
        for placement, size in zip(tensor.placements, tensor.device_mesh.shape, strict=True):
            if isinstance(placement, Shard):
                shape[placement.dim] = -(-shape[placement.dim] // size)
    return math.prod(shape)


def lay_into(parameter: nn.Parameter, values: Tensor) -> None:
    """Let ``values``, of any dtype, be the memory of what this process has of ``parameter``."""
    if isinstance(parameter, DTensor):
        alike: Any = as_part(parameter, values.new_empty(()).expand(values.shape))  # of a view, no deep copy is made
        parameter.data = alike  # the wrapper's dtype alone: it has no memory
        parameter._local_tensor, parameter._spec = values, alike._spec
    else:
        parameter.data = values


def divided(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which there is a part here or a copy."""
    return isinstance(tensor, DTensor)


def in_shards(tensor: Tensor) -> bool:
    """Whether other parts have other entries of ``tensor``."""
    return isinstance(tensor, DTensor) and any(placement.is_shard() for placement in tensor.placements)
