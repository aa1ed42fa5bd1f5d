"""What every op owes torch: opcheck, torch.compile, autocast, the same bits twice, empty tensors; on a GPU no host
synchronisation, CUDA graphs, and whichever device is current."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.optests.generate_tests import DEFAULT_TEST_UTILS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pipekern.kernels.language import INTERPRETED

from .cases import CASES

ALL = pytest.mark.parametrize("name", CASES)
UTILITIES = ("test_schema", "test_faketensor") if INTERPRETED else DEFAULT_TEST_UTILS
NOT_INTERPRETED = pytest.mark.skipif(INTERPRETED, reason="nothing of this is the interpreter's")


def case(name: str, device: str) -> tuple[Any, tuple[Any, ...]]:
    torch.manual_seed(1)
    return CASES[name](device)


def run(op: Any, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Outputs, gradients for gradients other than 1, and what the op changed."""
    outputs = [t for t in tree_leaves(op(*arguments)) if isinstance(t, Tensor)]
    inputs = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
    leaves = [t for t in inputs if t.requires_grad]
    grads: list[Tensor] = []
    if leaves:
        found = torch.autograd.grad(outputs, leaves, [torch.full_like(t, 0.75) for t in outputs], allow_unused=True)
        grads += [grad for grad in found if grad is not None]
    return [t.detach() for t in (*outputs, *grads, *inputs)]


def equal(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True)
    )


class Calls(TorchDispatchMode):
    """Every op of pipekern that is called, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.namespace == "pipekern":
            self.calls.append((function, tree_map(_copied, arguments), tree_map(_copied, options or {})))
        return function(*arguments, **(options or {}))


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _differentiable(value: Any) -> Any:
    return value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


@ALL
def test_opcheck(name: str, device: str) -> None:
    """Schema, fake tensors, autograd registration and tracing of the op and of its backward."""
    op, given = case(name, device)
    with Calls() as seen:
        run(op, given)
    trained = any(t.requires_grad for t in tree_leaves(given) if isinstance(t, Tensor))
    assert seen.calls
    for i, (function, arguments, options) in enumerate(seen.calls):
        if i == 0 and trained and not function._schema.is_mutable:  # those behind it are the backward's
            arguments = tree_map(_differentiable, arguments)
        torch.library.opcheck(function, arguments, options, test_utils=UTILITIES)


@ALL
@NOT_INTERPRETED
def test_compiled_whole(name: str, device: str) -> None:
    """Under torch.compile without a graph break, with the same bits."""
    op, arguments = case(name, device)
    want = run(*case(name, device))
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert equal(run(compiled, arguments), want)


@ALL
@NOT_INTERPRETED
def test_the_same_bits_twice(name: str, device: str) -> None:
    assert equal(run(*case(name, device)), run(*case(name, device)))


@ALL
@NOT_INTERPRETED
def test_autocast_changes_no_dtype(name: str, device: str) -> None:
    want = run(*case(name, device))
    with torch.autocast(device, torch.bfloat16):
        assert equal(run(*case(name, device)), want)
