"""The modules beside torch's own: names, outputs, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from tests.kernels.accuracy import DTYPES, compare

PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "RMSNorm": (lambda: pk.nn.RMSNorm(12), lambda: nn.RMSNorm(12), (5, 3, 12)),
    "RMSNorm over two": (lambda: pk.nn.RMSNorm([3, 4], 1e-3), lambda: nn.RMSNorm([3, 4], 1e-3), (5, 3, 4)),
    "RMSNorm, no weight": (
        lambda: pk.nn.RMSNorm(12, elementwise_affine=False),
        lambda: nn.RMSNorm(12, elementwise_affine=False),
        (12,),
    ),
    "LayerNorm": (lambda: pk.nn.LayerNorm(12), lambda: nn.LayerNorm(12), (5, 3, 12)),
    "LayerNorm over two": (lambda: pk.nn.LayerNorm((3, 4)), lambda: nn.LayerNorm((3, 4)), (2, 5, 3, 4)),
    "LayerNorm, no bias": (lambda: pk.nn.LayerNorm(12, bias=False), lambda: nn.LayerNorm(12, bias=False), (5, 12)),
    "GELU": (pk.nn.GELU, nn.GELU, (5, 12)),
    "GELU by tanh": (lambda: pk.nn.GELU("tanh"), lambda: nn.GELU("tanh"), (5, 3, 12)),
}
if hasattr(Tensor, "grad_dtype"):
    PAIRS["Linear"] = lambda: pk.nn.Linear(12, 7), lambda: nn.Linear(12, 7), (5, 3, 12)
    PAIRS["Linear, no bias"] = lambda: pk.nn.Linear(12, 7, bias=False), lambda: nn.Linear(12, 7, bias=False), (12,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pair", PAIRS)
def test_as_torch(pair: str, dtype: torch.dtype) -> None:
    """At most twice torch's own error, from the same state, which has the same names."""
    make, make_torchs, shape = PAIRS[pair]
    ours, theirs = make(), make_torchs()
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    weights = [torch.randn_like(p).to(dtype) for p in theirs.parameters()]
    names = [name for name, _ in theirs.named_parameters()]

    def run(module: nn.Module) -> Callable[..., Any]:
        def call(x: Tensor, *values: Tensor) -> Any:
            return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

        return call

    compare(run(ours), run(theirs), torch.randn(shape).to(dtype), *weights)


def test_golden() -> None:
    """(1, 7) has mean 4, variance 9 and mean square 25."""
    x = torch.tensor([[1.0, 7.0]])
    torch.testing.assert_close(pk.nn.RMSNorm(2, eps=0.0)(x), torch.tensor([[0.2, 1.4]]))
    torch.testing.assert_close(pk.nn.LayerNorm(2, eps=0.0)(x), torch.tensor([[-1.0, 1.0]]))
    torch.testing.assert_close(pk.nn.SwiGLU()(torch.tensor([2.0, 3.0])), torch.tensor([2 * 0.8807970 * 3]))
    q, k = pk.nn.RotaryEmbedding(2)(torch.tensor([1.0, 0.0]).expand(1, 2, 1, 2), torch.zeros(1, 2, 3, 2))
    torch.testing.assert_close(q[0, :, 0], torch.tensor([[1.0, 0.0], [0.5403023, 0.8414710]]))
    assert k.shape == (1, 2, 3, 2) and not k.any()


@pytest.mark.parametrize("kind", [pk.nn.RMSNorm, pk.nn.LayerNorm])
def test_a_norm_refuses_another_shape(kind: Any) -> None:
    with pytest.raises(pk.ConfigError, match=r"input is \(2, 6\).*\[\.\.\., 3, 4\]"):
        kind((3, 4))(torch.randn(2, 6))


def test_swiglu_of_halves() -> None:
    gate, up = torch.randn(2, 5, 8)
    both = torch.cat((gate, up), -1)
    torch.testing.assert_close(pk.nn.SwiGLU()(gate, up), pk.nn.SwiGLU()(both))


@pytest.mark.parametrize("neighbours", [False, True])
def test_rotary_positions(neighbours: bool) -> None:
    """Scores depend on the distance alone, and what is not turned stays."""
    turn = pk.nn.RotaryEmbedding(6, base=100.0, neighbours=neighbours)
    assert not turn.state_dict()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 9, 1, 8)
    q, k = turn(q, k)
    scores = torch.einsum("sd,td->st", q[0, :, 0], k[0, :, 0])
    for distance in range(-8, 9):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-5, atol=1e-5)
    assert torch.equal(q[0, 3, 0, 6:], q[0, 0, 0, 6:])
    later = turn(q, k, torch.arange(9))[0]
    assert torch.equal(later, turn(q, k, torch.arange(9).expand(1, 9))[0])


def test_rotary_takes_pairs() -> None:
    with pytest.raises(pk.ConfigError, match="dim=5"):
        pk.nn.RotaryEmbedding(5)


@pytest.mark.parametrize("compiled", [nn.RMSNorm(8), nn.LayerNorm(8), nn.GELU()], ids=lambda m: type(m).__name__)
def test_traced_whole(compiled: nn.Module) -> None:
    """torch.compile sees one graph (its inductor is left out: no compiler is needed)."""
    pk.nn.fuse(compiled)
    x = torch.randn(3, 8)
    assert torch.equal(torch.compile(compiled, backend="aot_eager", fullgraph=True)(x), compiled(x))
