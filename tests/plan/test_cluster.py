from __future__ import annotations

import math
from typing import Any

import pytest

from pipekern.errors import ConfigError
from pipekern.plan.cluster import Cluster, Device, Link


def test_golden_messages() -> None:
    """1 MB at 1 GB/s is a millisecond, after 10 µs; over several links the slowest counts."""
    devices = [Device(1e12), Device(2e12), Device(1e12)]
    cluster = Cluster(tuple(devices), (Link(10, 1e9), Link(5, 2e9)), copy_bandwidth=1e10)
    assert cluster.message(0, 1, 1e6) == cluster.message(1, 0, 1e6) == pytest.approx(1010)
    assert cluster.message(1, 2, 1e6) == pytest.approx(505)
    assert cluster.message(2, 0, 1e6) == pytest.approx(1010)
    assert cluster.message(1, 1, 1e6) == 0
    assert cluster.copy(1e6) == pytest.approx(100)
    assert [cluster.speed(rank) for rank in range(3)] == [1, 2, 1]


def test_from_plain_values() -> None:
    row = {"flops": 1e12, "memory": 8e9, "name": "card", "count": 2}
    read = Cluster.from_dict({"devices": [row, {"flops": 2e12}], "link": {"latency": 3}, "copy_bandwidth": 1e9})
    assert read == Cluster.of([Device(1e12, 8e9, name="card")] * 2 + [Device(2e12)], Link(3), 1e9)
    links = [{"latency": 1}, {"bandwidth": 5}]
    assert Cluster.from_dict({"devices": [{"flops": 1, "count": 3}], "links": links}).links == (Link(1), Link(0, 5))
    assert read.reordered([2, 0, 1]).devices == (read.devices[2], read.devices[0], read.devices[1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"devices": []}, "needs at least one device"),
        ({}, "it needs 'devices'"),
        ({"devices": [{"flops": 1, "speed": 2}]}, "cannot be read"),
        ({"devices": [{"flops": 0}]}, "flops=0"),
        ({"devices": [{"flops": math.inf}]}, "flops=inf"),
        ({"devices": [{"flops": 1, "memory": -1}]}, "memory=-1"),
        ({"devices": [{"flops": 1, "bandwidth": 0}]}, "bandwidth=0"),
        ({"devices": [{"flops": 1, "count": 2}], "link": {"latency": -1}}, "latency=-1"),
        ({"devices": [{"flops": 1, "count": 2}], "link": {"bandwidth": 0}}, "bandwidth=0"),
        ({"devices": [{"flops": 1, "count": 3}], "links": [{}]}, "1 links for 3 devices; give 2"),
        ({"devices": [{"flops": 1}], "copy_bandwidth": 0}, "copy_bandwidth=0"),
    ],
)
def test_wrong_input(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cluster.from_dict(data)
