"""What a module could be replaced by, told from what it has: parameters, children, and numbers that may be an epsilon.

A replacement is a class: the module becomes one of it, and keeps all it has. Those of torch's own classes are the
modules of ``pipekern.nn``; for others a subclass of theirs is made, with another forward. A shape only suggests:
whether both compute the same is for ``proof.py`` to find.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipekern.kernels.gelu import gelu
from pipekern.kernels.layer_norm import layer_norm
from pipekern.kernels.rms_norm import rms_norm
from pipekern.kernels.swiglu import swiglu
from pipekern.nn.gelu import GELU
from pipekern.nn.layer_norm import LayerNorm
from pipekern.nn.proof import like
from pipekern.nn.rms_norm import RMSNorm
from pipekern.nn.trailing import as_rows

OWN: dict[type[nn.Module], type[nn.Module]] = {nn.RMSNorm: RMSNorm, nn.LayerNorm: LayerNorm, nn.GELU: GELU}
_FEATURES, _WIDTH = 6, 5  # of a small feed-forward layer

Compute = Callable[[Any, Tensor], Tensor]  # of the module and its input


class Candidate(NamedTuple):
    """A class that a module might become, and what to prove it with: a small module like it, and inputs, float64.

    ``formula``: modules of one class and formula may share ``kind``.
    """

    op: str
    formula: tuple[Any, ...]
    kind: type[nn.Module]
    small: nn.Module
    inputs: list[Tensor]


def candidates(module: nn.Module) -> Iterator[Candidate]:
    """What ``module`` has the shape of, most likely first."""
    own = module._parameters.values()
    if any(b is not None for b in module._buffers.values()) or not _takes_one(module):
        return
    if module._modules:
        if not any(p is not None for p in own):
            yield from _feed_forward(module)
    elif type(module) in OWN:
        yield from _torchs(module)
    elif all(isinstance(v, _PLAIN) or callable(v) for name, v in vars(module).items() if name not in _BARE):
        yield from _elementwise_or_norm(module)


_BARE = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, tuple, torch.Size, torch.dtype, type(None))


def _takes_one(module: nn.Module) -> bool:
    """Whether its forward takes one value and nothing else."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return len(parameters) == 2 and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _becomes(module: nn.Module, compute: Compute) -> type[nn.Module]:
    """The class of ``module`` with ``compute`` as its forward, called by position or by name."""

    def forward(self: nn.Module, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        return compute(self, x)

    forward.__signature__ = inspect.signature(type(module).forward)  # type: ignore[attr-defined]
    return type(f"Fused{type(module).__name__}", (type(module),), {"forward": forward, "__module__": __name__})


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _rows(shape: tuple[int, ...], eps: float) -> list[Tensor]:
    """Rows of several ranks; with a mean, and so small that ``eps`` matters."""
    x = _normal(3, shape[0] + 1, *shape)
    return [x[0, 0], x[:, 0] + 0.5, 30 * x, x * eps**0.5]


# Norms and activations: nothing but parameters of one shape


def _torchs(module: Any) -> Iterator[Candidate]:
    kind = OWN[type(module)]
    shape = getattr(module, "normalized_shape", (3,))
    weights = {name: _normal(*shape) + 1 for name, p in module._parameters.items() if p is not None}
    small = like(module, weights, {})
    yield Candidate(kind.__name__, (), kind, small, _rows(shape, getattr(module, "eps", None) or 1e-6))


def _elementwise_or_norm(module: nn.Module) -> Iterator[Candidate]:
    weights = {name: p for name, p in module._parameters.items() if p is not None}
    shapes = {tuple(p.shape) for p in weights.values()} or {(7,)}
    if len(shapes) > 1 or len(weights) > 2 or any(len(shape) != 1 or not shape[0] for shape in shapes):
        return
    (shape,) = shapes
    small = like(module, {name: _normal(*shape) + i for i, name in enumerate(weights)}, {})
    epsilons = [name for name, value in vars(module).items() if type(value) is float and 0 < value < 1]
    for op, formula, compute in _formulas(list(weights), epsilons):
        eps = getattr(module, formula[0], 1.0)
        yield Candidate(op, (op, *formula), _becomes(module, compute), small, _rows(shape, eps))


def _formulas(weights: list[str], epsilons: list[str]) -> Iterator[tuple[str, tuple[Any, ...], Compute]]:
    """Op, what tells its formula from others (the epsilon first), and the formula."""
    if not weights:
        for approximate in ("none", "tanh"):
            yield "GELU", (f"gelu {approximate}",), _gelu(approximate)
    for eps in epsilons:
        if len(weights) < 2:
            for shift in (0, 1)[: 1 + len(weights)]:
                yield "RMSNorm", (eps, *weights, shift), _rms(*weights, eps=eps, shift=shift)
        for order in permutations(weights):
            yield "LayerNorm", (eps, *order), _layer(*order, eps=eps)


def _gelu(approximate: str) -> Compute:
    return lambda module, x: gelu(x, approximate=approximate)


def _rms(weight: str = "", *, eps: str, shift: int) -> Compute:
    def compute(module: Any, x: Tensor) -> Tensor:
        if not weight:
            return rms_norm(x, None, getattr(module, eps))
        scale = getattr(module, weight)
        if shift:  # not in bfloat16, where 1 + w has few digits left
            scale = shift + scale.to(torch.promote_types(scale.dtype, torch.float32))
        return rms_norm(as_rows(x, scale.shape), scale, getattr(module, eps))

    return compute


def _layer(weight: str = "", bias: str = "", *, eps: str) -> Compute:
    def compute(module: Any, x: Tensor) -> Tensor:
        if not weight:
            return layer_norm(x, None, None, getattr(module, eps))
        scale = getattr(module, weight)
        shift = getattr(module, bias) if bias else None
        return layer_norm(as_rows(x, scale.shape), scale, shift, getattr(module, eps))

    return compute


# Feed-forward layers: three linear layers, or two with gate and up in one


def _feed_forward(module: nn.Module) -> Iterator[Candidate]:
    linear = {name: m for name, m in module._modules.items() if isinstance(m, nn.Linear)}
    others = [m for name, m in module._modules.items() if m is not None and name not in linear]
    if len(linear) not in (2, 3) or any([*m.parameters(), *m.buffers()] for m in others):
        return
    for *into, down in permutations(linear):
        features, width = linear[down].out_features, linear[down].in_features
        wide = width * (3 - len(into))
        if any((linear[name].in_features, linear[name].out_features) != (features, wide) for name in into):
            continue
        sizes = dict.fromkeys(into, (_FEATURES, _WIDTH * (3 - len(into)))) | {down: (_WIDTH, _FEATURES)}
        small = like(module, {}, {name: _small(linear[name], *size) for name, size in sizes.items()})
        x = 2 * _normal(4, 3, _FEATURES)
        kind = _becomes(module, _swiglu(*into, down=down))
        yield Candidate("SwiGLU", ("SwiGLU", *into, down), kind, small, [x, x[0, 0]])


def _small(linear: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(outputs)
        small = nn.Linear(inputs, outputs, linear.bias is not None, dtype=torch.float64)
    small.weight.data.mul_(2)
    return small


def _swiglu(gate: str, up: str = "", *, down: str) -> Compute:
    def compute(module: Any, x: Tensor) -> Tensor:
        inner = getattr(module, gate)(x)
        return getattr(module, down)(swiglu(inner, getattr(module, up)(x) if up else None))

    return compute
