"""What torch says when a stage's forward does what it must not, and what it means here."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from pipekern.errors import ConfigError

_REFUSED = {
    "a leaf Variable that requires grad": "writes into its input in place, which autograd forbids on a received "
    "tensor; write to a copy, or give the module that writes an attribute `inplace = True`, and the stage copies its "
    "input",
    "yet support saved tensor hooks": "uses torch.func within its forward, which cannot be put away nor run again; use "
    "torch.autograd.grad, or leave out offload and recompute",
}
_MIXED = ("dtype", "scalar type", "should be the same")  # in torch's words for operands of several dtypes


def refusal(error: RuntimeError, stage: int, root: nn.Module, precision: torch.dtype | None) -> ConfigError | None:
    """The error to raise for one that the forward of a ``stage`` of the model ``root`` has raised, None if it is not
    known.
    """
    text = next((text for sign, text in _REFUSED.items() if sign in str(error)), None)
    if text is None and precision is not None and any(sign in str(error) for sign in _MIXED):
        text = _mixed(str(error).splitlines()[0], root, precision)
    return None if text is None else ConfigError(f"stage {stage} {text}")


def _mixed(error: str, root: nn.Module, precision: torch.dtype) -> str | None:
    """Low precision has met a buffer, here or in an earlier stage; None where the model has none that it could be."""
    wide = [
        f"{name}.{buffer}" if name else buffer
        for name, module in root.named_modules()
        if not isinstance(module, _NormBase)
        for buffer, value in module.named_buffers(recurse=False)
        if value.is_floating_point() and value.dtype is not precision
    ]
    if not wide:
        return None
    return (
        f"mixes dtypes ({error}): its weights are {precision}, and buffers keep their dtype, so that what is computed "
        f"with {', '.join(wide[:4])}{' …' if len(wide) > 4 else ''} has another one; cast a buffer where it meets a "
        "value, as in x + self.buffer.to(x.dtype)"
    )
