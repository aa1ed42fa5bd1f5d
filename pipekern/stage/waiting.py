"""Layers whose backward leaves the weight alone: it keeps what the weight gradient needs, to be made later.

``LAYERS`` gives the stand-in of each class's forward, ``FUNCTIONS`` that of each function: called with ``put``, which
takes the work that a backward leaves, and with what the layer or function is called with. Where the gradient cannot
wait unnoticed (a frozen or hooked weight, one that is itself computed, an option that is not known) they do what the
original does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from pipekern.kernels.linear_backward import linear_backward_weight
from pipekern.stage.work import Put, Work

Function = Callable[..., Tensor]


def _may_wait(weight: Any, bias: Tensor | None, value: Tensor) -> bool:
    """Whether the weight gradient may be made later, by hand, with nobody noticing."""
    return (
        torch.is_grad_enabled()
        and is_free(weight)
        and (bias is None or is_free(bias))
        and type(value) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_free(weight: Any) -> bool:
    """A plain, real, trainable parameter (no view, no parametrisation) that no hook watches."""
    return (
        type(weight) is nn.Parameter
        and weight.requires_grad
        and weight.is_floating_point()
        and not weight._backward_hooks
        and not weight._post_accumulate_grad_hooks
    )


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Of the parameter's ``.grad``: its own, or the wider one that its ``grad_dtype`` asks for (torch 2.13)."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def _sum_dtype(*parameters: Tensor | None) -> torch.dtype | None:
    """float32 where one of these, of 16 bits, has a gradient in float32: what is added to it is not rounded before."""
    wide = [p for p in parameters if p is not None and p.dtype.itemsize < 4 and gradient_dtype(p) is torch.float32]
    return torch.float32 if wide else None


def _go_together(value: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a product takes them: of one dtype, or of any that autocast makes one."""
    dtype = weight.dtype
    if value.dtype is dtype and (bias is None or bias.dtype is dtype):
        return True
    dtypes = value.dtype, dtype, dtype if bias is None else bias.dtype
    return torch.is_autocast_enabled(value.device.type) and value.is_floating_point() and torch.float64 not in dtypes


def _adds(ctx: Any) -> bool:
    """Whether this backward adds to the ``.grad`` of parameters, as that of a step does; ``torch.autograd.grad`` does
    not.
    """
    try:
        return all(torch._C._will_engine_execute_node(node) for node, _ in ctx.next_functions[1:])
    except RuntimeError:  # a parameter that torch.autograd.grad was asked for
        return False


def _used(ctx: Any, used: Tensor) -> Tensor:
    """The weight as the forward used it, with a graph where this backward is to be differentiated again."""
    return ctx.parameters[0].to(used.dtype) if torch.is_grad_enabled() else used


def _cast(value: Tensor) -> Tensor:
    """``value`` as autocast would hand it to a product."""
    if torch.is_autocast_enabled(value.device.type) and value.dtype is not torch.float64:
        return value.to(torch.get_autocast_dtype(value.device.type))
    return value


def _add(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.to(gradient_dtype(parameter))
    elif parameter.grad.layout is torch.strided:
        parameter.grad += gradient
    else:
        parameter.grad = gradient + parameter.grad


# Linear


def _linear_module(module: nn.Linear, put: Put, input: Tensor) -> Tensor:
    return _linear(put, input, module.weight, module.bias)


def _linear(put: Put, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _may_wait(weight, bias, input) or not _go_together(input, weight, bias):
        return F.linear(input, weight, bias)
    return _Linear.apply(_cast(input), weight, bias, put)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor, bias: Tensor | None, put: Put) -> Tensor:
        used = weight.to(value.dtype)
        ctx.save_for_backward(value, used)
        ctx.parameters, ctx.put = (weight, bias), put
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowADInplaceOrView():  # as a view, it could not be written in place
            return F.linear(value, used, None if bias is None else bias.to(value.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        value, used = ctx.saved_tensors
        weight, bias = ctx.parameters
        back = gradient.matmul(_used(ctx, used)) if ctx.needs_input_grad[0] else None
        if not _adds(ctx):
            rows = _matrix(gradient)
            return back, rows.t().mm(_matrix(value)), None if bias is None else rows.sum(0), None
        ctx.put(Work(functools.partial(_linear_weight, weight, bias), value, gradient))
        return back, None, None, None


def _matrix(value: Tensor) -> Tensor:
    return value.reshape(value.shape[:-1].numel(), value.shape[-1])


@torch.no_grad()
def _linear_weight(weight: Tensor, bias: Tensor | None, value: Tensor, gradient: Tensor) -> None:
    rows, columns = _matrix(gradient), _matrix(value)
    if _sum_dtype(weight) and (weight.grad is None or weight.grad.layout is torch.strided):
        beta = 0.0 if weight.grad is None else 1.0
        if weight.grad is None:
            weight.grad = torch.empty_like(weight, dtype=torch.float32)
        linear_backward_weight(rows, columns, weight.grad, beta)
    else:
        # Not addmm_: it rounds otherwise than autograd, 2.9 times as far for narrow layers, to save 2 % of W at 256.
        _add(weight, rows.t().mm(columns))
    if bias is not None:
        _add(bias, rows.sum(0, dtype=_sum_dtype(bias)))


# Convolutions


def _convolution_module(module: nn.Conv1d | nn.Conv2d, put: Put, input: Tensor) -> Tensor:
    if module.padding_mode != "zeros":
        return type(module).forward(module, input)  # type: ignore[arg-type]
    options = module.stride, module.padding, module.dilation, module.groups
    return _CONVOLUTIONS[len(module.kernel_size)](put, input, module.weight, module.bias, *options)


def _convolution(
    plain: Function,
    dims: int,
    put: Put,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    waits = _may_wait(weight, bias, input) and _go_together(input, weight, bias)
    if not waits or isinstance(padding, str) or input.dim() != dims + 2:
        return plain(input, weight, bias, stride, padding, dilation, groups)
    sizes = [[option] * dims if isinstance(option, int) else list(option) for option in (stride, padding, dilation)]
    return _Convolution.apply(_cast(input), weight, bias, put, plain, (*sizes, groups))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, weight: Tensor, bias: Tensor | None, put: Put, plain: Function, options: Any
    ) -> Tensor:
        used = weight.to(value.dtype)
        ctx.save_for_backward(value, used)
        ctx.parameters, ctx.put, ctx.options = (weight, bias), put, options
        ctx.set_materialize_grads(False)
        return plain(value, used, None if bias is None else bias.to(value.dtype), *options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None, None, None
        value, used = ctx.saved_tensors
        weight, bias = ctx.parameters
        adds = _adds(ctx)
        mask = ctx.needs_input_grad[0], not adds, not adds and bias is not None
        wanted = _convolution_backward(gradient, value, _used(ctx, used), ctx.options, mask)
        if adds:
            ctx.put(Work(functools.partial(_convolution_weight, weight, bias, used, ctx.options), value, gradient))
        return *wanted, None, None, None


def _convolution_backward(
    gradient: Tensor, value: Tensor, weight: Tensor, options: Any, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = options
    return torch.ops.aten.convolution_backward(
        gradient, value, weight, [weight.shape[0]], stride, padding, dilation, False, [0] * len(stride), groups, mask
    )


@torch.no_grad()
def _convolution_weight(
    weight: Tensor, bias: Tensor | None, used: Tensor, options: Any, value: Tensor, gradient: Tensor
) -> None:
    gradient, value, used = (tensor.to(dtype=_sum_dtype(weight, bias)) for tensor in (gradient, value, used))
    _, own, of_bias = _convolution_backward(gradient, value, used, options, (False, True, bias is not None))
    assert own is not None
    _add(weight, own)
    if bias is not None and of_bias is not None:
        _add(bias, of_bias)


# Embedding


def _embedding_module(module: nn.Embedding, put: Put, input: Tensor) -> Tensor:
    options = module.padding_idx, module.max_norm, module.norm_type, module.scale_grad_by_freq, module.sparse
    return _embedding(put, input, module.weight, *options)


def _embedding(
    put: Put,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or sparse or not _may_wait(weight, None, input):
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    ignored = -1 if padding_idx is None else padding_idx % len(weight)
    return _Embedding.apply(input, weight, put, (len(weight), ignored, scale_grad_by_freq))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Tensor, put: Put, options: Any) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.weight, ctx.put, ctx.options = weight, put, options
        ctx.set_materialize_grads(False)
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        (indices,) = ctx.saved_tensors
        if not _adds(ctx):
            return None, torch.ops.aten.embedding_dense_backward(gradient, indices, *ctx.options), None, None
        ctx.put(Work(functools.partial(_embedding_weight, ctx.weight, ctx.options), indices, gradient))
        return None, None, None, None


@torch.no_grad()
def _embedding_weight(weight: Tensor, options: Any, indices: Tensor, gradient: Tensor) -> None:
    wide = gradient.to(dtype=_sum_dtype(weight))
    _add(weight, torch.ops.aten.embedding_dense_backward(wide, indices, *options))


_CONVOLUTIONS = {
    1: functools.partial(_convolution, F.conv1d, 1),
    2: functools.partial(_convolution, F.conv2d, 2),
}
LAYERS: dict[type[nn.Module], Function] = {
    nn.Linear: _linear_module,
    nn.Conv1d: _convolution_module,
    nn.Conv2d: _convolution_module,
    nn.Embedding: _embedding_module,
}
FUNCTIONS: dict[Any, Function] = {
    F.linear: _linear,
    F.conv1d: _CONVOLUTIONS[1],
    F.conv2d: _CONVOLUTIONS[2],
    F.embedding: _embedding,
}
