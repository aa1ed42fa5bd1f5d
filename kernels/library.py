"""The ops' place in torch: ``torch.ops.pipekern``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .language import INTERPRETED

LIBRARY = torch.library.Library("pipekern", "DEF")


def _once(context: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "pipekern's kernels are differentiable once: use the module of torch for a second derivative"
    )


def define(
    schema: str,
    *,
    twin: Callable[..., Any],
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] = _once,
) -> None:
    """Register ``pipekern::schema``: ``twin`` runs on the CPU, ``kernel`` on CUDA, ``fake`` gives shapes and dtypes.

    ``save(ctx, inputs, output)`` and ``backward(ctx, *grads)`` are those of ``torch.library.register_autograd``. An op
    that changes its arguments has no gradient.
    """
    name = f"pipekern::{LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)}"
    torch.library.impl(name, "CPU", kernel if INTERPRETED else twin, lib=LIBRARY)
    torch.library.impl(name, "CUDA", kernel, lib=LIBRARY)
    torch.library.register_fake(name, fake, lib=LIBRARY)
    if "!" not in schema:
        torch.library.register_autograd(name, backward, setup_context=save, lib=LIBRARY)
