"""What only a GPU can show: no synchronisation, graphs, other devices, more than 2³¹ elements, whole grids."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from pipekern.kernels.accumulate import accumulate_
from pipekern.kernels.cross_entropy import cross_entropy
from pipekern.kernels.layer_norm import layer_norm
from pipekern.kernels.linear_cross_entropy import linear_cross_entropy
from pipekern.kernels.rms_norm import rms_norm
from pipekern.kernels.swiglu import swiglu
from pipekern.kernels.table import Table

from .accuracy import DTYPES, compare
from .cases import CASES
from .test_cross_entropy import torch_loss
from .test_ops import case, equal, run

pytestmark = pytest.mark.gpu
HERE = Path(__file__).parent
ALL = pytest.mark.parametrize("name", CASES)


@ALL
def test_no_synchronisation(name: str) -> None:
    op, arguments = case(name, "cuda")
    run(op, arguments)  # kernels are compiled and loaded here
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ALL
def test_replayed_in_a_graph(name: str) -> None:
    """A replay reads what is in memory then: the same bits as a call on it."""
    op, arguments = case(name, "cuda")
    kept = [t.detach().clone() for t in tree_leaves(arguments) if isinstance(t, Tensor)]

    def restore() -> None:
        with torch.no_grad():
            for t, value in zip((t for t in tree_leaves(arguments) if isinstance(t, Tensor)), kept, strict=True):
                t.copy_(value)

    restore()
    want = [t.clone() for t in run(op, arguments)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(op, arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(op, arguments)
    restore()
    graph.replay()
    torch.cuda.synchronize()
    assert equal(got, want)


@ALL
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_is_current(name: str) -> None:
    want = [t.cpu() for t in run(*case(name, "cuda:1"))]
    with torch.cuda.device(0):
        assert equal([t.cpu() for t in run(*case(name, "cuda:1"))], want)


@pytest.mark.full
@ALL
def test_compiled_by_inductor(name: str) -> None:
    op, arguments = case(name, "cuda")
    want = run(*case(name, "cuda"))
    torch.compiler.reset()
    for a, b in zip(run(torch.compile(op, fullgraph=True), arguments), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 1000, 4099, 4100, 8192, 16384, 40000])
@pytest.mark.parametrize("tokens", [1, 130])
def test_norms_of_model_sizes(dtype: torch.dtype, columns: int, tokens: int) -> None:
    x, residual = (torch.randn(tokens, columns, device="cuda").to(dtype) for _ in range(2))
    weight, bias = (torch.randn(columns, device="cuda").to(dtype) for _ in range(2))

    def rms(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return F.rms_norm(x + residual, (columns,), weight, 1e-6), x + residual

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (columns,), weight, bias, 1e-6)

    compare(lambda x, w, r: rms_norm(x, w, 1e-6, r), rms, x, weight, residual)
    compare(lambda x, w, b: layer_norm(x, w, b, 1e-6), layer, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [50257, 128256])
def test_losses_of_model_sizes(dtype: torch.dtype, vocabulary: int) -> None:
    logits = 3 * torch.randn(64, vocabulary, device="cuda").to(dtype)
    target = torch.randint(vocabulary, (64,), device="cuda")
    target[::5] = -100
    compare(lambda x: cross_entropy(x, target), lambda x: torch_loss(x, target), logits)
    x, weight = (torch.randn(n, 256, device="cuda").to(dtype) / 4 for n in (64, vocabulary))
    compare(
        lambda x, w: linear_cross_entropy(x, w, target),
        lambda x, w: torch_loss(F.linear(x, w), target),
        x,
        weight,
    )


def test_the_loss_of_a_model_stays_within_its_scratch() -> None:
    """T = 8192, H = 4096, V = 128256: under 300 MB beyond what it was given, the gradient of x included."""
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128256, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(128256, (8192,), device="cuda")
    main_grad = torch.zeros(128256, 4096, device="cuda")
    linear_cross_entropy(x[:64], weight, target[:64], main_grad=main_grad).backward()  # cuBLAS's workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_cross_entropy(x, weight, target, main_grad=main_grad)
    assert torch.cuda.max_memory_allocated() - before < 300e6 + x.nbytes
    loss.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def _tail(op: Callable[..., Any], *inputs: Tensor, rows: int = 3) -> None:
    """The last rows are what they are alone."""
    whole = op(*inputs)
    alone = op(*(t[-rows:].clone() if t.dim() > 1 else t for t in inputs))
    assert all(tree_leaves(tree_map(lambda a, b: torch.equal(a[-rows:], b), whole, alone)))


@pytest.mark.full
def test_more_than_two_to_the_31_elements() -> None:
    tokens, columns = 2**20 + 5, 2**11
    x = torch.empty(tokens, columns, device="cuda", dtype=torch.bfloat16).normal_()
    assert x.numel() > 2**31
    weight = torch.randn(columns, device="cuda")
    _tail(lambda x, w: rms_norm(x, w, 1e-6), x, weight)
    _tail(lambda x, w: layer_norm(x, w, None, 1e-6), x, weight)
    _tail(lambda a: swiglu(a, a), x)
    target = torch.randint(columns, (tokens, 1), device="cuda")
    _tail(lambda x, y: cross_entropy(x, y.squeeze(1), reduction="none"), x, target)
    flat = torch.zeros(2**31 + 5, device="cuda")
    accumulate_(Table([flat], [torch.ones_like(flat, dtype=torch.bfloat16)]))
    assert flat.min().item() == flat.max().item() == 1


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer, of the CUDA toolkit")
def test_no_access_out_of_bounds() -> None:
    """The golden examples, those of every stride, and odd vocabularies, under compute-sanitizer."""
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(HERE),
        "-k",
        "cuda and (golden or strides or anywhere)",
    ]
    done = subprocess.run(
        ["compute-sanitizer", "--error-exitcode", "3", *tests],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
