"""Weight gradients put off: those of autograd, and made in W where a layer can wait."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.stage.deferral import Deferral
from tests.stage.layers import CASES, Doubled


def gradients(*leaves: Tensor) -> list[float | None]:
    return [None if leaf.grad is None else leaf.grad.item() for leaf in leaves]


def test_golden() -> None:
    """y = w·x with w = 2, x = 3 and dy = 1: B gives dx = 2 at once, W gives dw = 3 when it is called."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    x = torch.tensor([[3.0]], requires_grad=True)
    deferral = Deferral([layer])
    with deferral:
        layer(x).sum().backward()
    assert gradients(x, layer.weight) == [2.0, None]
    for work in deferral.take():
        work()
    assert gradients(x, layer.weight) == [2.0, 3.0]
    assert "forward" not in layer.__dict__ and deferral.take() == []


def run(module: nn.Module, x: Tensor, deferral: Deferral | None = None) -> Tensor:
    """Forward and backward from a fixed random gradient."""
    torch.manual_seed(7)
    if deferral is None:
        y: Tensor = module(x)
        return _backward(y)
    with deferral:
        y = module(x)
        return _backward(y)


def _backward(y: Tensor) -> Tensor:
    if y.requires_grad:
        y.backward(torch.randn_like(y))
    return y.detach()


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_autograd(case: str) -> None:
    """Over two micro-batches, the second one's weight work first."""
    make, batch, waiting = CASES[case]
    module = make().double()
    plain = copy.deepcopy(module)
    deferral = Deferral(module.modules())
    inputs = [batch().detach() for _ in range(2)]
    kept = []
    for x in inputs:
        leaf, other = (x.clone().requires_grad_(x.is_floating_point() or x.is_complex()) for _ in range(2))
        assert torch.equal(run(module, leaf, deferral), run(plain, other))
        kept.append(deferral.take())
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-12, atol=1e-12)
        names = {name for name, p in module.named_parameters(remove_duplicate=False) if p.grad is None}
        assert names == waiting | {name for name, p in module.named_parameters() if not p.requires_grad}
    for work in [*kept[1], *kept[0]]:
        work()
    for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad.to_dense(), q.grad.to_dense(), rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (3, 64), (128, 33)])
def test_linear_layers_have_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """As a whole backward, over two micro-batches in order: a schedule that puts weight work off changes nothing."""
    module = nn.Linear(shape[-1], 40, dtype=dtype)
    plain = copy.deepcopy(module)
    for _ in range(2):
        x, deferral = torch.randn(shape, dtype=dtype), Deferral([module])
        run(module, x, deferral)
        for work in deferral.take():
            work()
        run(plain, x)
    assert torch.equal(module.weight.grad, plain.weight.grad)  # type: ignore[arg-type]
    assert torch.equal(module.bias.grad, plain.bias.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_weight_that_a_hook_watches_does_not_wait(hook: str) -> None:
    layer, seen = nn.Linear(4, 4), []
    getattr(layer.weight, hook)(lambda value: seen.append(value.shape))
    deferral = Deferral([layer])
    run(layer, torch.randn(2, 4), deferral)
    assert seen == [(4, 4)] and deferral.take() == [] and layer.weight.grad is not None


def test_module_hooks_fire_once() -> None:
    layer, seen = nn.Linear(4, 4), []
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    run(layer, torch.randn(2, 4, requires_grad=True), deferral := Deferral([layer]))
    assert seen == ["forward", "backward"] and len(deferral.take()) == 1


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.Conv1d(4, 4, 3)])
def test_autocast(make: Callable[[], nn.Module]) -> None:
    """The product and both its gradients in bfloat16, the weight's gradient in float32; as autograd has them."""
    module = make()
    plain, deferral = copy.deepcopy(module), Deferral(module.modules())
    x = torch.randn(4, 4) if isinstance(module, nn.Linear) else torch.randn(2, 4, 8)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        with deferral:
            y = module(ours)
        want = plain(theirs)
    assert y.dtype is torch.bfloat16 and torch.equal(y, want)
    gradient = torch.randn_like(y)
    with deferral:
        y.backward(gradient)
    want.backward(gradient)
    for work in deferral.take():
        work()
    assert ours.grad is not None and theirs.grad is not None
    assert ours.grad.dtype is torch.float32 and torch.equal(ours.grad, theirs.grad)
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and p.grad.dtype is torch.float32
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-2)


def test_without_gradients_and_outside_nothing_waits() -> None:
    layer = nn.Linear(4, 4)
    deferral = Deferral([layer])
    with deferral, torch.no_grad():
        assert not layer(torch.randn(2, 4)).requires_grad
    layer(torch.randn(2, 4)).sum().backward()
    assert deferral.take() == [] and layer.weight.grad is not None


def test_a_forward_that_somebody_replaced_stays() -> None:
    layer = nn.Linear(4, 4)
    own = layer.__dict__["forward"] = lambda x: x * 2
    run(layer, torch.randn(2, 4), Deferral([layer]))
    assert layer.__dict__["forward"] is own


def test_a_forward_that_somebody_replaces_later_is_the_one_that_runs() -> None:
    layer = nn.Linear(4, 4)
    deferral = Deferral([layer])
    own = layer.__dict__["forward"] = lambda x: x * 2
    assert torch.equal(run(layer, x := torch.randn(2, 4), deferral), 2 * x)
    assert layer.__dict__["forward"] is own


def test_a_class_that_somebody_changes_later_is_the_one_that_runs() -> None:
    layer = nn.Linear(4, 4)
    deferral = Deferral([layer])
    layer.__class__ = Doubled
    assert torch.equal(run(layer, x := torch.randn(2, 4), deferral), layer(x)) and deferral.take() == []


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.Conv1d(4, 4, 3)])
def test_dtypes_that_do_not_go_together_stay_an_error(make: Callable[[], nn.Module]) -> None:
    layer = make()
    with pytest.raises(RuntimeError, match="type"):
        run(layer, torch.randn(2, 4, 8)[..., : 4 if isinstance(layer, nn.Linear) else 8].double(), Deferral([layer]))


class Rounded(Tensor):
    """A weight with a product of its own, as quantisation has it."""


def test_a_weight_of_a_class_of_its_own_does_not_wait() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Rounded))
    run(layer, torch.randn(2, 4), deferral := Deferral([layer]))
    assert deferral.take() == [] and layer.weight.grad is not None


@pytest.mark.parametrize("written", ["input", "gradient"])
def test_what_weight_work_waits_for_must_not_be_written(written: str) -> None:
    layer = nn.Linear(4, 4)
    x, gradient = torch.randn(2, 4), torch.randn(2, 4)
    with (deferral := Deferral([layer])):
        layer(x).backward(gradient)
    (x if written == "input" else gradient).add_(1)
    (work,) = deferral.take()
    with pytest.raises(ConfigError, match="written in place"):
        work()


MAIN_GRADIENTS = pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"), reason="needs torch with Tensor.grad_dtype: a float32 gradient of 16 bits"
)


def with_main_gradients(module: nn.Module, start: float = 0.0) -> nn.Module:
    """In bfloat16, with gradients in float32 that are there."""
    for p in module.bfloat16().parameters():
        p.grad_dtype = torch.float32
        p.grad = torch.full_like(p, start, dtype=torch.float32)
    return module


def accumulate(module: nn.Module, x: Tensor, gradient: Tensor, times: int) -> None:
    deferral = Deferral(module.modules())
    for _ in range(times):
        with deferral:
            module(x).backward(gradient)
        for work in deferral.take():
            work()


@MAIN_GRADIENTS
@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Linear(1, 1), (1, 1)), (lambda: nn.Conv1d(1, 1, 1), (1, 1, 1)), (lambda: nn.Embedding(1, 1), None)],
)
def test_small_gradients_do_not_get_lost(make: Callable[[], nn.Module], shape: tuple[int, ...] | None) -> None:
    """1024 times 1e-3 onto 1: bfloat16 stays at 1, float32 comes to 2.024."""
    module = with_main_gradients(make(), start=1.0)
    x = torch.zeros(1, dtype=torch.int64) if shape is None else torch.ones(shape, dtype=torch.bfloat16)
    accumulate(module, x, torch.full_like(module(x), 1e-3), 1024)
    for p in module.parameters():
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert p.grad.item() == pytest.approx(2.024, abs=1e-3)


@MAIN_GRADIENTS
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(5, 7), (500, 5)),
        (lambda: nn.Conv1d(3, 4, 3), (8, 3, 60)),
        (lambda: nn.Conv2d(3, 4, 3), (4, 3, 12, 12)),
        (lambda: nn.Embedding(3, 6), None),
    ],
)
def test_sums_within_a_micro_batch_are_float32(make: Callable[[], nn.Module], shape: tuple[int, ...] | None) -> None:
    """Products and sums over its samples too: as in float64 to float32's precision, 16 bits are 3 digits."""
    module = with_main_gradients(make())
    x = torch.randint(3, (400,)) if shape is None else torch.randn(shape).bfloat16()
    gradient = torch.randn_like(module(x).detach())
    exact = copy.deepcopy(module).double()
    exact.zero_grad()
    accumulate(module, x, gradient, 1)
    exact(x if shape is None else x.double()).backward(gradient.double())
    for p, q in zip(module.parameters(), exact.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad.double(), q.grad.double(), rtol=1e-5, atol=1e-4)
