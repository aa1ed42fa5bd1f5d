"""A linear layer in tensor-parallel parts as a product of what is here, so that its weight gradient can wait.

weight by columns (outputs)   x whole, y in parts      gradients of x are terms of a sum over the parts
weight by rows (inputs)       x in parts, y a sum      of which the first part's term has the bias
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


def in_parts(input: DTensor, weight: Any, bias: Any, product: Callable[[Tensor], Tensor]) -> Tensor | None:
    """``F.linear`` of DTensors, made by ``product`` of what is here of ``input``; None for placements that torch's
    styles do not give a linear layer.
    """
    last = input.dim() - 1
    placed = [t.placements if isinstance(t, DTensor) else () for t in (input, weight)]
    back: Placement
    out: Placement
    of_bias: Placement
    if placed == [(Replicate(),), (Shard(0),)]:
        back, out, of_bias = Partial(), Shard(last), Shard(0)
    elif placed == [(Shard(last),), (Shard(1),)]:
        back, out, of_bias = Shard(last), Partial(), Replicate()
    else:
        return None
    if bias is not None and getattr(bias, "placements", ()) != (of_bias,):
        return None
    shape = torch.Size([*input.shape[:-1], weight.shape[0]])
    stride = torch.empty(shape, device="meta").stride()
    output = product(input.to_local(grad_placements=[back]))
    return DTensor.from_local(output, input.device_mesh, [out], run_check=False, shape=shape, stride=stride)


def bias_here(weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """What this part's product adds: of a sum over the parts, the first one's the bias."""
    if not isinstance(weight, DTensor) or not isinstance(bias, DTensor):
        return bias
    if weight.placements == (Shard(1),) and weight.device_mesh.get_local_rank():
        return None
    return bias._local_tensor
