from __future__ import annotations

import random

import pytest

from pipekern.errors import ConfigError
from pipekern.plan.cost import Layer
from pipekern.plan.memory import FLOAT32, MIXED, ParameterBytes, rank_memory, size
from pipekern.schedule.registry import build
from pipekern.schedule.simulate import peak_activations


def test_golden_two_ranks() -> None:
    """1f1b: rank 0 holds two micro-batches, rank 1 one; a link has the most messages in flight, plus one, as slots."""
    program = build("1f1b", ranks=2, microbatches=4).program()
    stages = [
        [Layer("a", 1, 1, 1, parameters=10, activations=100, output=8)],
        [Layer("b", 1, 1, 1, parameters=5, activations=30)],
    ]
    first, second = rank_memory(program, stages, FLOAT32)
    assert (first.weights, first.gradients, first.optimizer, first.activations) == (40, 40, 80, 200)
    assert (second.weights, second.gradients, second.optimizer, second.activations) == (20, 20, 40, 30)
    assert first.slots == 8 * program.slots[1, 0] and second.slots == 8 * program.slots[0, 1]
    assert first.total == 40 + 40 + 80 + 200 + first.slots
    mixed = rank_memory(program, stages, MIXED)[0]
    assert (mixed.weights, mixed.gradients, mixed.optimizer) == (20, 40, 120)


@pytest.mark.parametrize(
    "name", ["1f1b", "gpipe", "interleaved-1f1b", "zb-h2", "zb-v", "dualpipe", "seq1f1b", "chimera"]
)
def test_equal_layers_hold_what_the_schedule_counts(name: str) -> None:
    schedule = build(name, ranks=4, microbatches=8)
    each = random.randint(1, 1000) * 8
    stages = [[Layer("x", 1, 1, 1, parameters=3, activations=each)] for _ in range(schedule.depth)]
    memory = rank_memory(schedule.program(), stages, FLOAT32)
    shares = [schedule.share(schedule.stages_of(rank)[0]) for rank in range(4)]
    expected = [peak * each * share for peak, share in zip(peak_activations(schedule), shares, strict=True)]
    assert [m.activations for m in memory] == pytest.approx(expected)
    assert [m.weights for m in memory] == [12 * len(schedule.stages_of(rank)) for rank in range(4)]
    assert all(m.slots == 0 for m in memory)


def test_asynchronous_schedules_keep_two_versions() -> None:
    program = build("pipedream-2bw", ranks=2, microbatches=4).program()
    memory = rank_memory(program, [[Layer("a", 1, 1, 1, parameters=1)]] * 2, FLOAT32)
    assert [m.weights for m in memory] == [8, 8]


def test_sizes_for_a_reader() -> None:
    assert [size(12), size(2048), size(5.5 * 2**30), size(3 * 2**40)] == ["12 bytes", "2 KiB", "5.5 GiB", "3 TiB"]


def test_wrong_bytes() -> None:
    with pytest.raises(ConfigError, match="gradients=-1 bytes a parameter"):
        ParameterBytes(1, -1, 1)


def test_bytes_over_replicas() -> None:
    """With bf16 on 4 replicas: 2 + 4 + 12 bytes a parameter; then moments and masters, gradients, weights in shares."""
    assert ParameterBytes(2, 4, 12) == MIXED.over(4, 0)
    assert MIXED.over(4, 1) == ParameterBytes(2, 4 + 1, 3)
    assert MIXED.over(4, 2, resting=True) == ParameterBytes(2, 1, 3)
    assert MIXED.over(4, 3, resting=True) == ParameterBytes(0, 1, 3)
    assert FLOAT32.over(4, 3, resting=True) == ParameterBytes(0, 1, (8 + 4) / 4)
    with pytest.raises(ConfigError, match="replicas=0"):
        MIXED.over(0, 1)
