"""Whether a module's forward and a replacement compute the same: both are run."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5  # of the largest value: a forward may go through float32 within


def like(module: nn.Module, parameters: Mapping[str, Tensor], children: Mapping[str, nn.Module]) -> nn.Module:
    """A second module of the same class and attributes, with these parameters and children in place of its own."""
    second = copy.copy(module)
    given = {name: nn.Parameter(value) for name, value in parameters.items()}
    second.__dict__["_parameters"] = {**module._parameters, **given}
    second.__dict__["_modules"] = {**module._modules, **children}
    return second


def difference(module: nn.Module, kind: type[nn.Module], inputs: Sequence[Tensor]) -> float:
    """How far ``module`` and itself as a ``kind`` are apart, outputs and gradients, in training and in evaluation.

    ``inputs`` are float64, as the parameters of ``module`` are; the largest difference over the largest value comes
    back, infinite where shapes or dtypes differ. Raises what the forwards raise. The random state stays.
    """
    worst, modes = 0.0, [(m, m.training) for m in module.modules()]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for training in (True, False):
            module.train(training)
            for x in inputs:
                worst = max(worst, *map(_apart, _run(module, type(module), x), _run(module, kind, x)))
    for one, mode in modes:
        one.training = mode
    return worst


def _run(module: nn.Module, kind: type[nn.Module], x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input and parameters."""
    own, module.__class__ = module.__class__, kind
    try:
        x = x.clone().requires_grad_()
        y = module(x)
    finally:
        module.__class__ = own
    if not isinstance(y, Tensor):
        raise TypeError(f"the forward returns a {type(y).__name__}")
    leaves = [x, *module.parameters()]
    direction = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    found = torch.autograd.grad(y, leaves, direction, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True))]


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    largest = float(a.abs().max()) or 1.0
    apart = float((a - b).abs().max()) / largest
    return apart if math.isfinite(apart) else math.inf


@torch.no_grad()
def same_dtype(module: nn.Module, kind: type[nn.Module], x: Tensor) -> bool:
    """Whether both give one dtype for ``x``."""
    dtypes = []
    with torch.random.fork_rng(devices=[]):
        for cls in (type(module), kind):
            own, module.__class__ = module.__class__, cls
            try:
                dtypes.append(module(x).dtype)
            finally:
                module.__class__ = own
    return dtypes[0] is dtypes[1]
