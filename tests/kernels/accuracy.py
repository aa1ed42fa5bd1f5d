"""An op beside torch's: both against float64 on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VIEWS = ("contiguous", "transposed", "rows swapped", "half of wider rows", "unaligned", "expanded")


def compare(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    *inputs: Tensor | None,
    grads: Sequence[Tensor] = (),
) -> None:
    """Outputs and gradients must be as :func:`close` as those of ``theirs``; what is given must stay as it is."""
    given = [t for t in (*inputs, *grads) if t is not None]
    kept = [t.clone() for t in given]
    grads = list(grads)
    got = run(ours, inputs, grads)
    own = run(theirs, inputs, grads)
    exact = run(theirs, [None if t is None else t.double() for t in inputs], [grad.double() for grad in grads])
    for i, (a, b, e) in enumerate(zip(got, own, exact, strict=True)):
        close(a, b, e, f"tensor {i}")
    assert all(map(torch.equal, given, kept))


def close(a: Tensor, b: Tensor, e: Tensor, name: str = "") -> None:
    """The error of ``a`` against ``e``, its root mean square, must be at most twice that of ``b``.

    The largest of ``a`` at most three times, for the largest of a few roundings is chance. The error of ``b`` counts as
    a unit in the last place, at least: that of the root mean square, or of the largest value.
    """
    assert a.shape == e.shape, name
    if not e.numel():
        return
    ours, theirs, values = (a.double() - e).abs(), (b.double() - e).abs(), e.abs()
    for kind, factor in ((_root_mean_square, 2), (torch.max, 3)):
        error, unit = kind(ours), torch.finfo(a.dtype).eps * kind(values)
        allowed = factor * torch.maximum(kind(theirs), unit)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def _root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def run(op: Callable[..., Any], inputs: Sequence[Tensor | None], grads: list[Tensor]) -> list[Tensor]:
    """Outputs of the op, then gradients of its inputs for ``grads``, which are drawn where the list is empty."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    outputs = op(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if not grads:
        grads += [torch.randn_like(output) for output in outputs]
    found = torch.autograd.grad(outputs, [t for t in leaves if t is not None], grads)
    return [*(output.detach() for output in outputs), *found]


def views(*shape: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Tensors of one shape [a, b, c] with the strides of VIEWS."""
    a, b, c = shape

    def make(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device).to(dtype)

    made = (
        make(a, b, c),
        make(a, c, b).transpose(1, 2),
        make(b, a, c).transpose(0, 1),
        make(a, b, 2 * c)[..., c:],
        make(a * b * c + 1)[1:].view(a, b, c),
        make(b, 1).expand(a, b, c),
    )
    return dict(zip(VIEWS, made, strict=True))
