from __future__ import annotations

import random

import pytest

from pipekern.errors import ConfigError
from pipekern.plan.choose import choices, choose, costs, lightest
from pipekern.plan.cluster import Cluster, Device, Link
from pipekern.plan.cost import Layer
from pipekern.schedule.ir import Schedule
from pipekern.schedule.registry import build, describe
from pipekern.schedule.simulate import Costs, simulate


def test_golden_two_layers_on_two_ranks() -> None:
    """Only one layer a rank: 1f1b and gpipe take equally long, 1f1b holds less."""
    choice = choose([10, 10], [20, 20], ranks=2, microbatches=4)
    assert (choice.schedule.name, choice.split) == ("1f1b", (1, 1))
    assert choice.makespan == (4 + 1) * 30 and choice.bubble_ratio == pytest.approx(1 / 5) and choice.peak == 2


def test_more_layers_let_chunks_shorten_the_bubble() -> None:
    choice = choose([10] * 8, [20] * 8, ranks=2, microbatches=4)
    assert choice.schedule.chunks == 4 and choice.split == (1,) * 8
    kept = choose([10] * 8, [20] * 8, ranks=2, microbatches=4, chunks=2)
    assert kept.schedule.chunks == 2 and kept.split == (2,) * 4 and kept.makespan > choice.makespan


def test_overhead_of_an_action_speaks_for_fewer() -> None:
    assert choose([10] * 8, [20] * 8, ranks=2, microbatches=8, overhead=30).schedule.chunks == 1


def test_uneven_layers() -> None:
    choice = choose([1, 1, 1, 5], [2, 2, 2, 10], ranks=2, microbatches=4, schedules=["1f1b"])
    assert choice.split == (3, 1)


def test_memory_is_a_cap() -> None:
    free = choose([10] * 8, [20] * 8, ranks=2, microbatches=8)
    capped = choose([10] * 8, [20] * 8, ranks=2, microbatches=8, memory=2)
    assert capped.peak <= 2 < free.peak and capped.makespan >= free.makespan


def test_nothing_better_is_passed_over() -> None:
    rng = random.Random()
    for _ in range(5):
        ranks, microbatches = rng.randint(1, 4), rng.randint(1, 9)
        layers = [Layer("x", rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9)) for _ in range(9)]
        found = choices(layers, Cluster.of([Device(1.0)] * ranks, Link(rng.randint(0, 5))), microbatches)
        best = lightest(found.found)
        assert best.makespan <= min(choice.makespan for choice in found.found) * 1.01
        for choice in found.found:
            assert sum(choice.split) == 9 and len(choice.split) == choice.schedule.depth
            assert describe(choice.schedule.name).runnable and choice.schedule.synchronous
            choice.schedule.check()


def test_costs_of_stages() -> None:
    """A rank twice as fast; messages of 1 MB at 1 GB/s, copied at 10 GB/s by who sends them."""
    cluster = Cluster.of([Device(1.0), Device(2.0)], Link(5, 1e9), copy_bandwidth=1e10)
    stages = [[Layer("a", 10, 20, 30, output=1e6)], [Layer("b", 10, 20, 30)]]
    schedule = build("1f1b", ranks=2, microbatches=2)
    assert costs(schedule, stages, cluster, overhead=1) == Costs([111, 6], [21, 111], [30, 15], [1005])


def test_named_schedules_may_be_simulated_only() -> None:
    choice = choose([10] * 4, [10] * 4, weight=[10] * 4, ranks=4, microbatches=8, schedules=["zb-h1", "1f1b"])
    assert choice.schedule.name == "zb-h1"
    assert choice.makespan == simulate(build("zb-h1", ranks=4, microbatches=8), Costs(10, 10, 10)).makespan


def test_two_directions_share_the_cut() -> None:
    choice = choose([1, 3, 3, 1], [1, 3, 3, 1], ranks=2, microbatches=4, schedules=["chimera"])
    assert choice.split == (2, 2) and isinstance(choice.schedule, Schedule)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 0}, "ranks=0: there is no device"),
        ({"forward": [1, -1]}, "layer 'layer 1': forward=-1 is not a finite number"),
        ({"backward": [1]}, "costs of 2, 1, 2, 2 layers; give one value a layer"),
        ({"microbatches": 0}, "microbatches=0"),
        ({"memory": 0.5}, r"no schedule for 2 ranks and 4 micro-batches:(.|\n)*1f1b, 4 micro-batches: holds 2 activ"),
        ({"ranks": 3}, "1f1b has 3 stages and the model 2 layers"),
        ({"schedules": ["1f2b"]}, "schedule='1f2b' is not known; nearest: 1f1b"),
        ({"link": Link(1), "outputs": [-1, 0]}, "output=-1"),
    ],
)
def test_wrong_input(arguments: dict[str, object], message: str) -> None:
    given = {"forward": [1, 1], "backward": [1, 1], "ranks": 2, "microbatches": 4} | arguments
    with pytest.raises(ConfigError, match=message):
        choose(**given)  # type: ignore[arg-type]
