"""Whether a parameter's gradient may be made by hand, later, and how it is added to ``.grad``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor

from pipekern.parallel.tensor import as_part, local


def may_wait(weight: Any, bias: Tensor | None, value: Tensor, kind: type = nn.Parameter) -> bool:
    """Whether the weight gradient may be made later, by hand, with nobody noticing."""
    return (
        torch.is_grad_enabled()
        and is_free(weight, kind)
        and (bias is None or is_free(bias, kind))
        and type(value) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_free(weight: Any, kind: type = nn.Parameter) -> bool:
    """A plain, real, trainable parameter (no view, no parametrisation) that no hook watches; of the class ``kind``."""
    return (
        type(weight) is kind
        and isinstance(weight, nn.Parameter)
        and weight.requires_grad
        and weight.is_floating_point()
        and not weight._backward_hooks
        and not weight._post_accumulate_grad_hooks
    )


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Of the parameter's ``.grad``: its own, or the wider one that its ``grad_dtype`` asks for (torch 2.13)."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def sum_dtype(*parameters: Tensor | None) -> torch.dtype | None:
    """float32 where one of these, of 16 bits, has a gradient in float32: what is added to it is not rounded before."""
    wide = [p for p in parameters if p is not None and p.dtype.itemsize < 4 and gradient_dtype(p) is torch.float32]
    return torch.float32 if wide else None


def go_together(value: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a product takes them: of one dtype, or of any that autocast makes one."""
    dtype = weight.dtype
    if value.dtype is dtype and (bias is None or bias.dtype is dtype):
        return True
    dtypes = value.dtype, dtype, dtype if bias is None else bias.dtype
    return torch.is_autocast_enabled(value.device.type) and value.is_floating_point() and torch.float64 not in dtypes


def adds_to_grad(ctx: Any) -> bool:
    """Whether this backward adds to the ``.grad`` of parameters, as that of a step does; ``torch.autograd.grad`` does
    not.
    """
    try:
        return all(torch._C._will_engine_execute_node(node) for node, _ in ctx.next_functions[1:])
    except RuntimeError:  # a parameter that torch.autograd.grad was asked for
        return False


def with_graph(ctx: Any, used: Tensor) -> Tensor:
    """The weight as the forward used it, with a graph where this backward is to be differentiated again."""
    weight = ctx.parameters[0]
    if not torch.is_grad_enabled():
        return used
    return (weight.to_local() if isinstance(weight, DTensor) else weight).to(used.dtype)


def cast(value: Tensor) -> Tensor:
    """``value`` as autocast would hand it to a product."""
    if torch.is_autocast_enabled(value.device.type) and value.dtype is not torch.float64:
        return value.to(torch.get_autocast_dtype(value.device.type))
    return value


def add(parameter: Tensor, gradient: Tensor) -> None:
    """Add to ``.grad`` what is here of a gradient."""
    if parameter.grad is None:
        parameter.grad = as_part(parameter, gradient.to(gradient_dtype(parameter)))
    elif in_place(parameter):
        local(parameter.grad).add_(gradient)
        note_written(parameter)
    else:
        parameter.grad = as_part(parameter, gradient) + parameter.grad


def in_place(parameter: Tensor) -> bool:
    """Whether what is here of a gradient may be added to the memory of ``.grad``."""
    grad = parameter.grad
    placed = isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements
    return grad is None or (grad.layout is torch.strided and not placed)


def note_written(parameter: Tensor) -> None:
    """Count a write into the memory of ``.grad``, which a DTensor's own version does not."""
    if isinstance(parameter.grad, DTensor):
        torch.autograd.graph.increment_version(parameter.grad)
