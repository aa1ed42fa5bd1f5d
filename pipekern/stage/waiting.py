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
from torch.distributed.tensor import DTensor

from pipekern.kernels.linear_backward import linear_backward_weight
from pipekern.parallel.tensor import as_part, local, settled
from pipekern.stage.gradient import (
    add,
    adds_to_grad,
    cast,
    go_together,
    in_place,
    may_wait,
    note_written,
    sum_dtype,
    with_graph,
)
from pipekern.stage.parts import bias_here, in_parts
from pipekern.stage.work import Put, Work

Function = Callable[..., Tensor]


# Linear


def _linear_module(module: nn.Linear, put: Put, input: Tensor) -> Tensor:
    return _linear(put, input, module.weight, module.bias)


def _linear(put: Put, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kind = DTensor if isinstance(input, DTensor) else nn.Parameter
    if not may_wait(weight, bias, local(input), kind) or not go_together(input, weight, bias):
        return F.linear(input, weight, bias)
    if not isinstance(input, DTensor):
        return _Linear.apply(cast(input), weight, bias, put)
    output = in_parts(input, weight, bias, lambda value: _Linear.apply(cast(value), weight, bias, put))
    return F.linear(input, weight, bias) if output is None else output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor, bias: Tensor | None, put: Put) -> Tensor:
        value, used, added = settled(value), local(weight).to(value.dtype), bias_here(weight, bias)
        ctx.save_for_backward(value, used)
        ctx.parameters, ctx.put = (weight, bias), put
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowADInplaceOrView():  # as a view, it could not be written in place
            return F.linear(value, used, None if added is None else added.to(value.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        gradient = settled(gradient)
        value, used = ctx.saved_tensors
        weight, bias = ctx.parameters
        back = gradient.matmul(with_graph(ctx, used)) if ctx.needs_input_grad[0] else None
        if not adds_to_grad(ctx):
            rows = _matrix(gradient)
            own = as_part(weight, rows.t().mm(_matrix(value)))
            return back, own, None if bias is None else as_part(bias, rows.sum(0)), None
        ctx.put(Work(functools.partial(_linear_weight, weight, bias), value, gradient))
        return back, None, None, None


def _matrix(value: Tensor) -> Tensor:
    return value.reshape(value.shape[:-1].numel(), value.shape[-1])


@torch.no_grad()
def _linear_weight(weight: Tensor, bias: Tensor | None, value: Tensor, gradient: Tensor) -> None:
    rows, columns = _matrix(gradient), _matrix(value)
    if sum_dtype(weight) and in_place(weight):
        beta = 0.0 if weight.grad is None else 1.0
        if weight.grad is None:
            weight.grad = torch.empty_like(weight, dtype=torch.float32)
        linear_backward_weight(rows, columns, local(weight.grad), beta)
        note_written(weight)
    else:
        # Not addmm_: it rounds otherwise than autograd, 2.9 times as far for narrow layers, to save 2 % of W at 256.
        add(weight, rows.t().mm(columns))
    if bias is not None:
        add(bias, rows.sum(0, dtype=sum_dtype(bias)))


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
    waits = may_wait(weight, bias, input) and go_together(input, weight, bias)
    if not waits or isinstance(padding, str) or input.dim() != dims + 2:
        return plain(input, weight, bias, stride, padding, dilation, groups)
    sizes = [[option] * dims if isinstance(option, int) else list(option) for option in (stride, padding, dilation)]
    return _Convolution.apply(cast(input), weight, bias, put, plain, (*sizes, groups))


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
        adds = adds_to_grad(ctx)
        mask = ctx.needs_input_grad[0], not adds, not adds and bias is not None
        wanted = _convolution_backward(gradient, value, with_graph(ctx, used), ctx.options, mask)
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
    gradient, value, used = (tensor.to(dtype=sum_dtype(weight, bias)) for tensor in (gradient, value, used))
    _, own, of_bias = _convolution_backward(gradient, value, used, options, (False, True, bias is not None))
    assert own is not None
    add(weight, own)
    if bias is not None and of_bias is not None:
        add(bias, of_bias)


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
    if max_norm is not None or sparse or not may_wait(weight, None, input):
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
        if not adds_to_grad(ctx):
            return None, torch.ops.aten.embedding_dense_backward(gradient, indices, *ctx.options), None, None
        ctx.put(Work(functools.partial(_embedding_weight, ctx.weight, ctx.options), indices, gradient))
        return None, None, None, None


@torch.no_grad()
def _embedding_weight(weight: Tensor, options: Any, indices: Tensor, gradient: Tensor) -> None:
    wide = gradient.to(dtype=sum_dtype(weight))
    add(weight, torch.ops.aten.embedding_dense_backward(wide, indices, *options))


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
