"""DTensors and what of them is here."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pipekern.parallel.tensor import Parts, as_part, divided, in_shards, lay_into, local, part_of, room, whole
from tests.launch import launch, values


def _golden() -> None:
    dist.init_process_group("gloo")
    index = dist.get_rank()
    parts = Parts(dist.new_group([0, 1]), torch.device("cpu"), index, 2, lambda: None)
    full = torch.arange(6.0).view(3, 2)
    rows = distribute_tensor(full, parts.mesh, [Shard(0)], src_data_rank=None)
    own = [full[:2], full[2:]][index]
    assert torch.equal(local(rows), own)
    assert torch.equal(whole(rows), full)
    assert torch.equal(part_of(rows, full + 1), own + 1)
    assert in_shards(rows) and divided(rows)
    assert room(rows) == 4  # two rows, also where one is
    assert not in_shards(distribute_tensor(full, parts.mesh, [Replicate()], src_data_rank=None))
    parameter = nn.Parameter(rows)
    memory = torch.zeros(10)
    view = memory[: own.numel()].view(own.shape)
    lay_into(parameter, view)
    parameter.grad = as_part(parameter, own.clone())
    torch.optim.SGD([parameter], lr=1.0).step()
    assert torch.equal(view, -own)
    assert torch.equal(whole(parameter), -full)
    lay_into(parameter, view.half())
    assert parameter.dtype is whole(parameter).dtype is torch.float16
    dist.destroy_process_group()


def test_golden_rows_of_a_matrix() -> None:
    values(launch(_golden, 2))


def test_a_plain_tensor_is_all_there() -> None:
    plain = torch.ones(2)
    assert local(plain) is whole(plain) is plain
    assert part_of(plain, plain) is as_part(plain, plain) is plain
    assert not in_shards(plain) and not divided(plain)
    assert room(plain) == 2
