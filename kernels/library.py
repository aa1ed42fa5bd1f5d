"""The ops' place in torch: ``torch.ops.pipekern``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .language import INTERPRETED

LIBRARY = torch.library.Library("pipekern", "DEF")


def _once(context: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "pipekern's kernels are differentiable once: use the module of torch for a second derivative"
    )


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, counting up the versions of what it writes, so that autograd sees a saved tensor change."""
    arguments = getattr(torch.ops.pipekern, name.removeprefix("pipekern::")).default._schema.arguments
    written = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]

    def run(*values: Any) -> Any:
        result = function(*values)
        if not torch.is_inference_mode_enabled():
            torch.autograd.graph.increment_version(tree_leaves([values[i] for i in written if values[i] is not None]))
        return result

    return run


def _differentiable(name: str, save: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """What ``torch.library.register_autograd`` registers, in half the time: schemas here have no default values."""
    op = getattr(torch.ops.pipekern, name.removeprefix("pipekern::")).default

    def forward(context: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        save(context, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def run(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return run


def define(
    schema: str,
    *,
    twin: Callable[..., Any],
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] = lambda *_: None,
    backward: Callable[..., Any] = _once,
    interpreted: bool = INTERPRETED,
) -> None:
    """Register ``pipekern::schema``: ``twin`` runs on the CPU, ``kernel`` on CUDA, ``fake`` gives shapes and dtypes.

    ``save(ctx, inputs, output)`` and ``backward(ctx, *grads)`` are those of ``torch.library.register_autograd``; a
    schema has no default values. An op that changes its arguments has no gradient. ``interpreted``: CPU tensors, too,
    go through ``kernel``.
    """
    name = f"pipekern::{LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)}"
    if "!" in schema:
        twin, kernel = _counted(name, twin), _counted(name, kernel)
    torch.library.impl(name, "CPU", kernel if interpreted else twin, lib=LIBRARY)
    torch.library.impl(name, "CUDA", kernel, lib=LIBRARY)
    torch.library.register_fake(name, fake, lib=LIBRARY)
    if "!" not in schema:
        torch.library.impl(name, "Autograd", _differentiable(name, save, backward), lib=LIBRARY)
