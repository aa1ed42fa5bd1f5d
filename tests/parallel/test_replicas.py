"""Sums, scatters, gathers and broadcasts between processes, and what ends a wait for them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import pipekern as pk
from pipekern.parallel.replicas import Replicas, speed
from pipekern.transport.world import World, join
from tests.launch import launch, values

WITHIN = 2.0  # seconds until a survivor knows


def _replicas() -> tuple[Replicas, World]:
    world = join("auto", 20.0)
    assert world is not None
    group = dist.new_group(list(range(world.size)), backend="gloo")
    return Replicas(group, world.rank, world.size, world.control.check), world


def _golden() -> dict[str, Any]:
    """Replica i has (i + 1) × (1, 2, …, 6)."""
    replicas, world = _replicas()
    own = torch.arange(1.0, 7.0) * (replicas.index + 1)
    total, part = own.clone(), torch.full((6 // replicas.size,), torch.nan)
    replicas.sum(total).wait()
    replicas.scatter(own, part).wait()
    after_sums = dict(replicas.sent)
    whole = torch.full((6,), torch.nan)
    whole.tensor_split(replicas.size)[replicas.index].copy_(part)
    replicas.gather(whole).wait()
    replicas.equalise(own)
    sent = dict(replicas.sent)
    world.close()
    return {"sum": total, "part": part, "whole": whole, "first": own, "after sums": after_sums, "sent": sent}


@pytest.mark.parametrize("size", [2, 3])
def test_golden(size: int) -> None:
    """1 + 2 is 3, 1 + 2 + 3 is 6. A ring sends (n - 1) / n of the bytes to scatter or gather, twice that to sum."""
    total = torch.arange(1.0, 7.0) * (3 if size == 2 else 6)
    share = 24 * (size - 1) // size
    for index, found in enumerate(values(launch(_golden, size))):
        assert torch.equal(found["sum"], total)
        assert torch.equal(found["part"], total.tensor_split(size)[index])
        assert torch.equal(found["whole"], total)
        assert torch.equal(found["first"], torch.arange(1.0, 7.0))
        assert found["after sums"] == {"reduce": 3 * share, "gather": 0}
        assert found["sent"] == {"reduce": 3 * share, "gather": share}


def _held() -> list[bool]:
    """Whether a pending that was waited for still holds what was given."""
    replicas, world = _replicas()
    values = [torch.ones(1024) for _ in range(3)]
    held = [StorageWeakRef(value.untyped_storage()) for value in values]
    begun = [replicas.sum(values[0]), replicas.scatter(values[1], torch.empty(512)), replicas.gather(values[2])]
    for pending in begun:
        pending.wait()
    del values
    found = [not storage.expired() for storage in held]
    assert all(pending.done() for pending in begun)
    world.close()
    return found


def test_what_has_ended_holds_no_memory() -> None:
    """A span of the timeline outlives the step."""
    assert values(launch(_held, 2)) == [[False] * 3] * 2


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _random(seed: int) -> list[list[Tensor]]:
    """Each dtype: what this replica gave, and what it got; two of each under way at once."""
    replicas, world = _replicas()
    torch.manual_seed(seed + replicas.index)
    found: list[list[Tensor]] = []
    for dtype in DTYPES:
        given = [torch.randn(36).to(dtype) for _ in range(2)]
        sums, parts = [g.clone() for g in given], [g.new_full((36 // replicas.size,), torch.nan) for g in given]
        wholes = [torch.full_like(g, torch.nan) for g in given]
        for whole, g in zip(wholes, given, strict=True):
            own = slice(len(parts[0]) * replicas.index, len(parts[0]) * (replicas.index + 1))
            whole[own] = g[own]
        begun = [replicas.sum(s) for s in sums] + [replicas.scatter(g, p) for g, p in zip(given, parts, strict=True)]
        begun += [replicas.gather(whole) for whole in wholes]
        for pending in reversed(begun):
            pending.wait()
        assert all(pending.done() and pending.started < pending.ended for pending in begun)
        found.append([torch.stack(values) for values in (given, sums, parts, wholes)])
    world.close()
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_any_values(size: int, seed: int) -> None:
    """Against float64, within the rounding of each dtype; sums have the same bits on all replicas."""
    for dtype, *rows in zip(DTYPES, *values(launch(_random, size, seed)), strict=True):
        given = [row[0].double() for row in rows]
        wanted, tolerance = sum(given), 4 * size * torch.finfo(dtype).eps
        for index, (_, sums, parts, wholes) in enumerate(rows):
            assert torch.equal(sums, rows[0][1])
            assert (sums.double() - wanted).abs().max() <= tolerance
            assert (parts.double() - wanted.tensor_split(size, 1)[index]).abs().max() <= tolerance
            expected = torch.cat([g.tensor_split(size, 1)[i] for i, g in enumerate(given)], 1)
            assert torch.equal(wholes.double(), expected)


def _equalise() -> tuple[list[list[int]], list[str]]:
    """Values of every dtype and layout that a module can have."""
    replicas, world = _replicas()
    n = replicas.index
    made = [
        torch.full((), n, dtype=torch.int64), torch.tensor([n == 0, n == 1]), torch.full((3,), n, dtype=torch.bfloat16),
        torch.full((2, 3), float(n)).t(), torch.full((1, 2, 3, 3), float(n)).to(memory_format=torch.channels_last),
        torch.full((2,), n, dtype=torch.uint8), torch.full((2,), n + 1j), torch.full((0,), float(n)),
        torch.arange(6.0)[::2] + n, torch.full((2,), n, dtype=torch.int32),
        torch.full((2,), float(n)).to(torch.float8_e4m3fn),
    ]  # fmt: skip
    for value in made:
        replicas.equalise(value)
    world.close()
    return [value.flatten().view(torch.uint8).tolist() for value in made], [str(value) for value in made]


def test_equalise_takes_any_tensor() -> None:
    """Bit for bit what the first had, whose own stay."""
    (first, text), (second, same) = values(launch(_equalise, 2))
    assert first == second and text == same
    assert text[:2] == ["tensor(0)", "tensor([ True, False])"] and "tensor([0., 2., 4.])" in text


def _speed() -> tuple[float, float, dict[str, int]]:
    replicas, world = _replicas()
    found = speed(replicas, torch.device("cpu"))
    world.close()
    return (*found, replicas.sent)


def test_speed_is_a_latency_and_a_bandwidth_and_is_not_counted() -> None:
    for latency, bandwidth, sent in values(launch(_speed, 2)):
        assert latency > 0 and bandwidth > 0 and sent == {"reduce": 0, "gather": 0}


class Seen(NamedTuple):
    """What a survivor raised."""

    kind: str
    rank: int
    text: str
    after: float


def _wait_for_the_dead(kind: str, stamp: str) -> Seen:
    """The last rank dies, or fails, while the others wait for it."""
    replicas, world = _replicas()
    values = torch.ones(1 << 16)
    replicas.sum(values).wait()
    if replicas.index == replicas.size - 1:
        time.sleep(0.3)  # the others are in their wait
        Path(stamp).write_text(str(time.monotonic()))
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        error = ValueError("a fault in the user's code")
        world.abort(error, "a test")
        world.close()
        return Seen("", -1, "", 0.0)
    begin = {"sum": replicas.sum, "gather": replicas.gather}
    operation = "gather" if kind == "gather killed" else "sum"
    try:
        begin[operation](values).wait()
    except pk.TransportError as error:
        return Seen(type(error).__name__, error.rank, str(error), time.monotonic() - float(Path(stamp).read_text()))
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["killed", "failed"])
def test_a_wait_ends_with_the_job(kind: str, size: int, tmp_path: Path) -> None:
    outcomes = launch(_wait_for_the_dead, size, kind, str(tmp_path / "stamp"), timeout=30)
    assert (outcomes[-1].error is not None) is (kind == "killed")
    for seen in values(outcomes[:-1]):
        assert seen.kind == ("PeerDied" if kind == "killed" else "Aborted"), seen.text
        assert seen.rank == size - 1 and f"rank {size - 1}" in seen.text
        assert seen.after < WITHIN, seen
