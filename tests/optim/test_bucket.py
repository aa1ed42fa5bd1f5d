"""Parameters in one memory, with several replicas in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.optim.bucket import Bucket, divide
from tests.optim.together import Together

SHAPES = [(3, 5), (7,), (), (2, 2, 2)]


def _named(seed: int, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: Any = torch.float32) -> list[Any]:
    torch.manual_seed(seed)
    return [(f"p{i}", nn.Parameter(torch.randn(shape).to(dtype))) for i, shape in enumerate(shapes)]


def test_golden() -> None:
    """Two replicas, zero 1: 3 + 2 numbers of float64, each parameter on 16 bytes, make 8, of which each has 4."""
    data = {"a": torch.tensor([1.0, 2, 3]), "b": torch.tensor([4.0, 5])}
    named = [[(name, nn.Parameter(value.double())) for name, value in data.items()] for _ in range(2)]
    first, second = (Bucket(own, None, r, zero=1) for own, r in zip(named, Together.all(2), strict=True))
    assert first.values.tolist() == [1, 2, 3, 0, 4, 5, 0, 0]
    assert [(p.name, p.start, p.parameter.tolist()) for p in first.pieces] == [("a", 0, [1, 2, 3])]
    assert [(p.name, p.start, p.parameter.tolist()) for p in second.pieces] == [("b", 0, [4, 5])]
    for bucket, factor in ((first, 1.0), (second, 10.0)):
        bucket.begin()
        for p in bucket.parameters:
            assert p.grad is not None
            p.grad += p.detach() * factor
    for bucket in (first, second):
        bucket.seal()
        bucket.reduce()
    for bucket in (first, second):
        bucket.finish()
        assert all(p.grad is None for p in bucket.parameters if p is not bucket.pieces[0].parameter)
    (a,), (b,) = first.pieces, second.pieces
    assert a.parameter.grad is not None and b.parameter.grad is not None
    assert a.parameter.grad.tolist() == [11, 22, 33] and b.parameter.grad.tolist() == [44, 55]
    with torch.no_grad():
        a.parameter.sub_(1)
        b.parameter.sub_(1)
    pending = [bucket.gather() for bucket in (first, second)]
    for one in pending:
        assert one is not None
        one.wait()
    assert first.values.tolist() == second.values.tolist() == [0, 1, 2, 0, 3, 4, 0, 0]
    assert [p.tolist() for p in second.parameters] == [[0, 1, 2], [3, 4]]


def _step(buckets: Sequence[Bucket], grads: Sequence[Sequence[Tensor]]) -> None:
    """Two micro-batches with half of ``grads[replica][parameter]`` each."""
    for bucket in buckets:
        bucket.part()
    pending = [bucket.gather() for bucket in buckets]
    for one in pending:
        if one is not None:
            one.wait()
    for bucket, own in zip(buckets, grads, strict=True):
        for piece in bucket.pieces:
            piece.parameter.grad = None
        bucket.begin()
        for _ in range(2):
            for p, grad in zip(bucket.parameters, own, strict=True):
                half = grad.to(p.dtype) / 2
                p.grad = half.to(getattr(p, "grad_dtype", None) or p.dtype) if p.grad is None else p.grad.add_(half)
    if buckets[0]._replicas is not None:
        for bucket in buckets:
            bucket.seal()
            bucket.reduce()
            bucket.release()
    for bucket in buckets:
        bucket.finish()


def _whole(buckets: Sequence[Bucket], of: str) -> dict[str, Tensor]:
    """Parameters, or gradients, put together from the pieces by hand."""
    found: dict[str, list[Tensor]] = {}
    for bucket in buckets:
        for piece in bucket.pieces:
            value = piece.parameter.detach() if of == "values" else piece.parameter.grad
            assert value is not None and piece.start == sum(part.numel() for part in found.get(piece.name, []))
            found.setdefault(piece.name, []).append(value.flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 3), st.sampled_from([None, torch.bfloat16]), st.integers(1, 4))
def test_steps_of_an_optimizer(seed: int, zero: int, low: torch.dtype | None, size: int) -> None:
    """Momentum on what the replicas have is momentum on the whole with the sum of their gradients, bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [tuple(torch.randint(1, 9, (k,), generator=generator)) for k in (0, 1, 2, 3)]
    alone = size == 1
    replicas = [None] if alone else Together.all(size)
    buckets = [Bucket(_named(seed, shapes), low, r, 0 if alone else zero) for r in replicas]
    plain = [p for _, p in _named(seed, shapes)]
    optimizers = [
        torch.optim.SGD([p.parameter for p in b.pieces] or [nn.Parameter(torch.ones(1))], 0.1, 0.9) for b in buckets
    ]
    reference = torch.optim.SGD(plain, 0.1, 0.9)
    for _ in range(3):
        grads = [[torch.randn(p.shape, generator=generator) for p in plain] for _ in range(size)]
        if low is not None:
            grads = [[grad.to(low).float() for grad in own] for own in grads]
        _step(buckets, grads)
        for place, p in enumerate(plain):
            p.grad = torch.stack([own[place] for own in grads]).sum(0)
        for optimizer in optimizers:
            optimizer.step()
        reference.step()
        if zero == 0 or alone:
            for bucket in buckets:
                wanted = {f"p{i}": p.detach() for i, p in enumerate(plain)}
                assert all(torch.equal(piece.parameter, wanted[piece.name]) for piece in bucket.pieces)
        else:
            got = _whole(buckets, "values")
            assert all(torch.equal(got[f"p{i}"], p.detach().flatten()) for i, p in enumerate(plain))
    pending = [bucket.gather() for bucket in buckets]
    for one in pending:
        if one is not None:
            one.wait()
    for bucket in buckets:
        for p, wish in zip(bucket.parameters, plain, strict=True):
            assert torch.equal(p, wish.to(low) if low else wish) and p.shape == wish.shape


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_what_is_there_when(zero: int) -> None:
    """Gradients from begin to finish at 2, values from gather to release at 3."""
    buckets = [Bucket(_named(0), torch.bfloat16, r, zero) for r in Together.all(2)]
    for bucket in buckets:
        assert bucket.values.untyped_storage().nbytes() == (0 if zero == 3 else bucket.values.nbytes)
        assert bucket.masters.numel() == bucket.count // 2 and bucket.masters.dtype is torch.float32
    _step(buckets, [[torch.ones(p.shape) for p in bucket.parameters] for bucket in buckets])
    for bucket in buckets:
        assert (bucket._gradients is None) is (zero > 1)
        assert bucket.values.untyped_storage().nbytes() == (0 if zero == 3 else bucket.values.nbytes)
        assert bucket._reduced is not None and bucket._reduced.numel() == bucket.count // 2


@pytest.mark.parametrize("zero", range(4))
def test_two_steps_without_zero_grad_have_memory_of_their_own(zero: int) -> None:
    """What was there before a step is not overwritten by it."""
    buckets = [Bucket(_named(0), None, r, zero) for r in Together.all(2)]
    ones = [[torch.ones(p.shape) for p in bucket.parameters] for bucket in buckets]
    _step(buckets, ones)
    for bucket in buckets:
        bucket.part()
    before = [[piece.parameter.grad for piece in bucket.pieces] for bucket in buckets]
    _step(buckets, ones)
    for bucket, own in zip(buckets, before, strict=True):
        for piece, grad in zip(bucket.pieces, own, strict=True):
            assert grad is not None and piece.parameter.grad is not None
            assert grad is not piece.parameter.grad and bool((grad == 2).all())


def _made(bucket: Bucket) -> bool:
    return bucket.made


@pytest.mark.parametrize("replicas", [1, 2])
def test_values_of_an_optimizer_that_writes_them_are_not_made_again(replicas: int) -> None:
    """And are, where another one has changed the masters."""
    buckets = [Bucket(_named(0), torch.bfloat16, r, 0) for r in (Together.all(2) if replicas == 2 else [None])]
    for bucket in buckets:
        assert not _made(bucket)
        bucket.gather()
        for piece in bucket.pieces:
            piece.parameter.grad = torch.zeros_like(piece.parameter)
        bucket.mark()
        assert _made(bucket)
        with torch.no_grad():
            for piece in bucket.pieces:
                piece.parameter.add_(1.0)
        assert not _made(bucket)
        bucket.gather()
        for p, (_, wish) in zip(bucket.parameters, _named(0), strict=True):
            assert torch.equal(p, (wish + 1).bfloat16())
        copies = bucket.copies()
        assert all(torch.equal(copies[piece.parameter], piece.parameter.bfloat16()) for piece in bucket.pieces)
        assert all(c.untyped_storage().data_ptr() == bucket.values.data_ptr() for c in copies.values())


def test_an_optimizer_writes_no_value_without_a_gradient() -> None:
    """What changed before its step, and took no part in it, is made anew."""
    bucket = Bucket(_named(0), torch.bfloat16, None, 0)
    bucket.gather()
    stepped, other = bucket.pieces[0].parameter, bucket.pieces[1].parameter
    stepped.grad = torch.zeros_like(stepped)
    with torch.no_grad():
        other.add_(1.0)
    bucket.mark()
    assert not _made(bucket)
    bucket.gather()
    assert torch.equal(bucket.parameters[1], other.bfloat16())


def test_a_gradient_that_replicas_would_not_find() -> None:
    """Put elsewhere by a hook, or written when the sum has begun."""
    for late in (False, True):
        first, second = (Bucket(_named(0), None, r, 0) for r in Together.all(2))
        first.begin()
        second.begin()
        if not late:
            first.parameters[1].grad = torch.ones(7)
            with pytest.raises(ConfigError, match="the gradient of p1 was put elsewhere"):
                first.seal()
            continue
        first.seal()
        second.seal()
        pending = first.reduce(), second.reduce()
        assert pending[0] is not None
        assert first.parameters[0].grad is not None
        first.parameters[0].grad.add_(1.0)
        with pytest.raises(ConfigError, match="written after the last weight work"):
            first.finish()


def test_a_failed_step_is_forgotten() -> None:
    first, second = buckets = [Bucket(_named(0), None, r, 1) for r in Together.all(2)]
    for bucket in buckets:
        bucket.begin()
    for p in first.parameters:
        assert p.grad is not None
        p.grad.add_(torch.nan)
    for bucket in buckets:
        bucket.clear()
        assert all(p.grad is None for p in bucket.parameters)
    _step(buckets, [[torch.ones(p.shape) for p in bucket.parameters] for bucket in (first, second)])
    assert all(bool((value == 2).all()) for value in _whole(buckets, "gradients").values())


@pytest.mark.parametrize("replicas", [1, 2])
def test_whole(replicas: int) -> None:
    """Of masters in one part, what belongs to each parameter; nothing of a piece is a zero."""
    for bucket in [Bucket(_named(3), torch.bfloat16, r, 0) for r in (Together.all(2) if replicas == 2 else [None])]:
        whole = bucket.whole([*(piece.parameter.detach() for piece in bucket.pieces[:-1]), None], bucket.masters.dtype)
        *wanted, last = _named(3)
        assert list(whole) == bucket.names and not whole[last[0]].any() and whole[last[0]].shape == last[1].shape
        assert all(torch.equal(whole[name], p) and whole[name].dtype is torch.float32 for name, p in wanted)


@pytest.mark.parametrize(
    ("sizes", "limit", "wanted"),
    [
        ([], 10, []),
        ([("a", 4), ("b", 6)], 10, [["a", "b"]]),
        ([("a", 4), ("b", 7)], 10, [["a"], ["b"]]),
        ([("a", 40), ("b", 1), ("c", 1)], 10, [["a"], ["b", "c"]]),
    ],
)
def test_divide(sizes: list[tuple[str, int]], limit: int, wanted: list[list[str]]) -> None:
    assert divide(sizes, limit) == wanted


@given(st.lists(st.integers(1, 100)), st.integers(1, 150))
def test_laws_of_divide(sizes: list[int], limit: int) -> None:
    """All, in order; a run that is too large has one name; no two runs would fit into one."""
    named = [(str(i), size) for i, size in enumerate(sizes)]
    runs = divide(named, limit)
    assert [name for run in runs for name in run] == [name for name, _ in named]
    total = [sum(sizes[int(name)] for name in run) for run in runs]
    assert all(size <= limit or len(run) == 1 for size, run in zip(total, runs, strict=True))
    assert all(size + sizes[int(after[0])] > limit for size, after in zip(total, runs[1:], strict=False))
