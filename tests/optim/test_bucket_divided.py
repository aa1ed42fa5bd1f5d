"""Parameters in tensor-parallel parts in one memory: every part's is cut alike, and holds its own numbers."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pipekern.optim.bucket import Bucket
from pipekern.parallel.tensor import Parts, local, whole
from tests.launch import launch, values
from tests.optim.together import Together

ROWS = torch.arange(1.0, 10.0).view(3, 3)  # of which the parts have two and one
PLAIN = torch.tensor([10.0, 11.0])


def _named(parts: Parts) -> list[tuple[str, nn.Parameter]]:
    rows = distribute_tensor(ROWS.double(), parts.mesh, [Shard(0)], src_data_rank=None)
    return [("rows", nn.Parameter(rows)), ("plain", nn.Parameter(PLAIN.double()))]


def _parts() -> Parts:
    dist.init_process_group("gloo")
    return Parts(dist.new_group([0, 1]), torch.device("cpu"), dist.get_rank(), 2, lambda: None)


def _shards() -> list[list[tuple[str, int, list[float]]]]:
    """The pieces of two replicas after a step that adds gradient and number: 6 numbers of room for rows, and 2."""
    parts = _parts()
    named = [_named(parts) for _ in range(2)]
    buckets = [Bucket(own, None, r, zero=1) for own, r in zip(named, Together.all(2), strict=True)]
    for bucket in buckets:
        bucket.begin()
        for p in bucket.parameters:
            assert p.grad is not None
            p.grad += p.detach()
    for bucket in buckets:
        bucket.seal()
        bucket.reduce()
    for bucket in buckets:
        bucket.finish()
        with torch.no_grad():
            for piece in bucket.pieces:
                assert type(piece.parameter) is nn.Parameter
                assert piece.parameter.grad is not None
                piece.parameter.add_(piece.parameter.grad)
    for pending in [bucket.gather() for bucket in buckets]:
        assert pending is not None
        pending.wait()
    for bucket in buckets:
        rows, plain = bucket.parameters
        assert torch.equal(whole(rows), 3 * ROWS.double())
        assert torch.equal(plain, 3 * PLAIN.double())
    dist.destroy_process_group()
    return [[(piece.name, piece.start, piece.parameter.tolist()) for piece in bucket.pieces] for bucket in buckets]


def test_golden_shards_of_rows() -> None:
    """Replica 0 has the first 4 of 8 numbers on either part; the second part's rows end within them."""
    first, second = values(launch(_shards, 2))
    assert first == [[("rows", 0, [3, 6, 9, 12])], [("rows", 4, [15, 18]), ("plain", 0, [30, 33])]]
    assert second == [[("rows", 0, [[21, 24, 27]])], [("plain", 0, [30, 33])]]


def _masters() -> None:
    parts = _parts()
    named = [(name, nn.Parameter(p.detach().float())) for name, p in _named(parts)]
    bucket = Bucket(named, torch.bfloat16, None, zero=0)
    rows = bucket.parameters[0]
    assert isinstance(rows, DTensor)
    assert rows.dtype is local(rows).dtype is torch.bfloat16
    assert local(rows).untyped_storage().data_ptr() == bucket.values.untyped_storage().data_ptr()
    assert copy.deepcopy(rows).dtype is torch.bfloat16
    for turn in (1, 2):
        bucket.part()
        bucket.begin()
        (rows * 1).sum().backward()
        bucket.finish()
        (master, _) = (piece.parameter for piece in bucket.pieces)
        assert isinstance(master, DTensor)
        assert isinstance(master.grad, DTensor)
        assert master.dtype is master.grad.dtype is local(master.grad).dtype is torch.float32
        torch.optim.SGD([master], lr=1.0).step()
        bucket.gather()
        assert torch.equal(whole(rows), (ROWS - turn).bfloat16())
    dist.destroy_process_group()


def test_masters_of_rows() -> None:
    """float32 DTensors, which step by what the bfloat16 rows have as gradient."""
    values(launch(_masters, 2))
