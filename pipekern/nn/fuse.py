"""Modules of a model replaced in place by those of ``pipekern.nn``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from pipekern.nn import rotation, shapes
from pipekern.nn.fused import Fused
from pipekern.nn.proof import TOLERANCE, difference, same_dtype

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OURS = (shapes.__name__, rotation.__name__)


_Kinds = dict[tuple[type[nn.Module], tuple[Any, ...]], Any]  # one class for all modules of a class and formula


class _Found(NamedTuple):
    op: str
    kind: type[nn.Module]


def fuse(model: nn.Module) -> Fused:
    """Let norms, GELUs, SwiGLU feed-forwards and rotary embeddings of ``model`` run pipekern's kernels, in place.

    A module is known by its shape (its parameters, children and numbers) and by what it computes: before it is replaced
    a small one like it runs in both forms on random inputs, forward and backward, in training and evaluation, and
    they must agree to 1e-5. It stays the same object, of a subclass of its class, so that parameters, tied weights,
    names in the ``state_dict``, mode and ``requires_grad`` are untouched. One that has hooks, or a forward of its own
    on the instance, or is in a compiled region is left as it is.

    Results have the dtype of the input, and statistics are float32. There is no second derivative, and on a GPU no
    float64. The subclasses are
    made here and cannot be pickled: ``undo()`` first. Returns what was replaced, and what was left and why.
    """
    done, kinds = Fused(), _Kinds()
    compiled = _compiled(model)
    repeats = rotation.repeats_angles(model)
    for name, module in model.named_modules():
        if isinstance(module, tuple(shapes.OWN.values())) or type(module).__module__ in _OURS:
            continue  # fused before
        found, why = _proven(module, kinds) if not isinstance(module, nn.Linear) else (None, "")
        if found is None and not why:
            found, why = _rotation(module, repeats, kinds)
        if found is not None:
            why = why or _hindrance(module, found, compiled)
        if why:
            done.leave(name, module, why)
        elif found is not None:
            done.become(name, module, *found)
    return done


def _proven(module: nn.Module, kinds: _Kinds) -> tuple[_Found | None, str]:
    """What ``module`` computes; else why it does not compute what its shape suggests, if it suggests anything."""
    reasons = []
    for one in shapes.candidates(module):
        try:
            apart = difference(one.small, one.kind, one.inputs)
            if apart > TOLERANCE:
                reasons.append(f"it does not compute {one.op}: apart by {apart:.2g} of the largest value")
            elif not same_dtype(one.small.bfloat16(), one.kind, one.inputs[0].bfloat16()):
                reasons.append(f"as {one.op} it would return another dtype")
            else:
                return _Found(one.op, kinds.setdefault((type(module), one.formula), one.kind)), ""
        except Exception as error:  # foreign code, on inputs that it may not be made for
            reasons.append(f"as {one.op} it raises {type(error).__name__}: {error}")
    if not module._parameters and not module._modules:
        return None, ""  # any activation or dropout has the shape of a GELU
    return None, "; ".join(dict.fromkeys(reasons))


def _rotation(module: nn.Module, repeats: bool, kinds: _Kinds) -> tuple[_Found | None, str]:
    key = type(module), ("rope",)
    if key not in kinds:
        kinds[key] = rotation.rotating(type(module))
    kind = kinds[key]
    if kind is None:
        return None, ""
    return _Found("rope", kind), "" if repeats else "nothing in the model is seen to repeat its angles for both halves"


def _hindrance(module: nn.Module, found: _Found, compiled: set[int]) -> str:
    passed_over = [m for m in module.children() if not isinstance(m, nn.Linear)] if found.op == "SwiGLU" else []
    for one in (module, *passed_over):
        if any(getattr(one, kind) for kind in _HOOKS):
            return f"{type(one).__name__} has hooks"
        if "forward" in vars(one):
            return f"the forward of {type(one).__name__} was replaced on the instance"
    return "it is in a compiled region: fuse first, then compile" if id(module) in compiled else ""


def _compiled(model: nn.Module) -> set[int]:
    def within() -> Iterator[nn.Module]:
        for module in model.modules():
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                yield from module.modules()
            elif isinstance(module, torch.jit.ScriptModule):
                yield module

    return {id(module) for module in within()}
