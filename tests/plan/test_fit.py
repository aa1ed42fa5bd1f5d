from __future__ import annotations

import json
import random

import pytest

from pipekern.errors import ConfigError
from pipekern.plan.cluster import Cluster, Device, Link
from pipekern.plan.cost import Layer, Measured
from pipekern.plan.fit import fit
from pipekern.plan.memory import FLOAT32


def model(layers: int = 4, parameters: float = 10, activations: float = 100, output: float = 1) -> Measured:
    """Layers of 30 µs a sample and 160 bytes of parameters, gradients and moments."""
    return Measured([Layer(f"l{i}", 10, 10, 10, parameters, activations, output) for i in range(layers)])


def test_golden_plan() -> None:
    """Four samples on two ranks: one a micro-batch; 1f1b holds two micro-batches on the first rank."""
    plan = fit(model(2), Cluster.of([Device(1.0)] * 2), samples=4, schedules=["1f1b"], bytes_each=FLOAT32)
    assert (plan.choice.schedule.name, plan.choice.split) == ("1f1b", (1, 1))
    assert (plan.choice.schedule.microbatches, plan.samples, plan.step_time) == (4, 1, 150)
    assert [m.activations for m in plan.memory] == [200, 100]
    assert [m.weights + m.gradients + m.optimizer for m in plan.memory] == [160, 160]
    assert plan.layers_of(1) == [range(1, 2)]


def test_as_json() -> None:
    plan = fit(model(), Cluster.of([Device(1.0, 1e6), Device(2.0)], Link(1)), samples=4, microbatches=[2, 4])
    data = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert data["step_us"] == plan.step_time and sum(data["split"]) == 4
    assert [row["capacity"] for row in data["ranks"]] == [1e6, None]
    assert data["ranks"][0]["memory"]["total"] == plan.memory[0].total


def test_memory_decides_between_schedules() -> None:
    """What holds least where memory is scarce, what is fastest where it is not."""
    roomy = fit(model(8), Cluster.of([Device(1.0)] * 2), samples=8, microbatches=[8], bytes_each=FLOAT32)
    assert roomy.choice.schedule.chunks > 1
    need = max(m.total for m in roomy.memory)
    tight = fit(model(8), Cluster.of([Device(1.0, need - 1)] * 2), samples=8, microbatches=[8], bytes_each=FLOAT32)
    assert max(m.total for m in tight.memory) < need and tight.step_time >= roomy.step_time


def test_cut_again_under_the_caps() -> None:
    """By time three layers each; the first rank holds two micro-batches and has room for two layers' only."""
    cluster = Cluster.of([Device(1.0, 800), Device(1.0, 2000)])
    plan = fit(model(6), cluster, samples=4, microbatches=[4], schedules=["1f1b"], bytes_each=FLOAT32)
    assert plan.choice.split == (2, 4)


def test_devices_in_any_order() -> None:
    """One micro-batch at a time in flight at the end, so the device with little memory belongs there."""
    cluster = Cluster.of([Device(1.0, 700, name="small"), Device(1.0, 2000, name="large")])
    arguments = {"samples": 4, "microbatches": [4], "schedules": ["1f1b"], "bytes_each": FLOAT32}
    plan = fit(model(4), cluster, order="any", **arguments)  # type: ignore[arg-type]
    assert plan.devices == (1, 0) and plan.choice.split == (2, 2)
    assert fit(model(4), cluster, **arguments).choice.split == (1, 3)  # type: ignore[arg-type]


def test_another_first_device_does_not_change_what_layers_take() -> None:
    """Layers of 60 and 30 µs on the slow first device; the fast one takes the large one, in whatever place: 30 each."""
    rows = [Layer(name, time, time, time) for name, time in (("large", 20), ("small", 10))]
    cluster = Cluster.of([Device(1.0, name="slow"), Device(2.0, name="fast")])
    plan = fit(Measured(rows), cluster, samples=4, microbatches=[4], schedules=["1f1b"], order="any")
    assert plan.devices == (1, 0) and plan.step_time == 30 * 5
    assert [layer.forward for layer in plan.layers] == [10, 5]  # on rank 0


def test_never_over_the_cap_and_says_what_would_fit() -> None:
    rng = random.Random()
    for _ in range(12):
        devices = [Device(1.0, rng.randint(500, 2500)) for _ in range(rng.randint(1, 3))]
        try:
            plan = fit(model(6), Cluster.of(devices), samples=8, bytes_each=FLOAT32)
            assert all(m.total <= d.memory for m, d in zip(plan.memory, devices, strict=True))
        except ConfigError as error:
            assert "more than the" in str(error) and "would fit: the same plan on devices with" in str(error)
    with pytest.raises(ConfigError):
        fit(model(6), Cluster.of([Device(1.0, 100)]), samples=8)


def test_golden_refusal() -> None:
    cluster = Cluster.of([Device(1.0, 500, name="card")] * 2, Link(1))
    with pytest.raises(ConfigError) as raised:
        fit(model(4, output=0), cluster, samples=8, microbatches=[2], schedules=["gpipe"], bytes_each=FLOAT32)
    assert str(raised.value).splitlines() == [
        "the plan does not fit: the nearest (gpipe, 2 micro-batches) needs 1.875 KiB on rank 0, 1.387 KiB more than "
        "the 500 bytes of its card",
        "  rank 0 holds: weights 80 bytes, gradients 80 bytes, optimizer 160 bytes, activations 1.562 KiB, slots "
        "0 bytes",
        "  would fit: the same plan on devices with 1.875 KiB",
    ]


def test_more_microbatches_would_fit() -> None:
    cluster = Cluster.of([Device(1.0, 800)] * 2)
    with pytest.raises(ConfigError, match="would fit: 8 micro-batches"):
        fit(model(4, output=0), cluster, samples=8, microbatches=[2], schedules=["1f1b"], bytes_each=FLOAT32)
    plan = fit(model(4, output=0), cluster, samples=8, microbatches=[8], schedules=["1f1b"], bytes_each=FLOAT32)
    assert max(memory.total for memory in plan.memory) <= 800


def test_more_devices_would_fit() -> None:
    with pytest.raises(ConfigError, match="would fit: 3 devices"):
        fit(model(4, output=0), Cluster.of([Device(1.0, 561)] * 2), samples=4, bytes_each=FLOAT32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples=0: a step needs at least 1"),
        ({"microbatches": [5]}, r"microbatches=\[5\]: give numbers from 1 to samples=4"),
        ({"microbatches": []}, r"microbatches=\[\]"),
        ({"schedules": ["interleaved-1f1b"], "microbatches": [3]}, "no schedule takes 2 ranks"),
        ({"schedules": ["nothing"]}, "schedule='nothing' is not known"),
    ],
)
def test_wrong_input(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(model(), Cluster.of([Device(1.0)] * 2), **({"samples": 4} | arguments))  # type: ignore[arg-type]


def test_links_that_differ_fix_the_order() -> None:
    cluster = Cluster((Device(1.0),) * 3, (Link(1), Link(2)))
    with pytest.raises(ConfigError, match="all links are equal"):
        fit(model(), cluster, samples=4, order="any")
