from __future__ import annotations

import math
from typing import Any

import pytest

from pipekern.errors import ConfigError
from pipekern.plan.cluster import Device
from pipekern.plan.cost import Estimated, Layer, Measured, Work, measured, read, transformer

DEVICE = Device(flops=1e12, bandwidth=1e11)
SIZES = {"layers": 2, "dim": 8, "heads": 2, "vocab": 10, "sequence": 4}


def test_golden_roofline() -> None:
    """1 Gflop at 1 Tflop/s is 1 ms; 50 MB at 100 GB/s are half of that, and weights are read once a micro-batch."""
    work = Work("layer", flops=1e9, moved=40e6, parameters=5e6, activations=100, output=10)
    assert Estimated([work]).layers(1, DEVICE) == [Layer("layer", 1000, 1000, 1000, 5e6, 100, 10)]
    assert Estimated([work]).layers(2, DEVICE) == [Layer("layer", 2000, 2000, 2000, 5e6, 200, 20)]
    (bound,) = Estimated([Work("layer", flops=1, moved=40e6, parameters=5e6)]).layers(2, DEVICE)
    assert bound.forward == pytest.approx(900)


def test_a_layer_without_parameters_has_no_weight_gradient() -> None:
    (layer,) = Estimated([Work("relu", flops=1e9)]).layers(1, DEVICE)
    assert (layer.forward, layer.backward, layer.weight) == (1000, 1000, 0)


class Times:
    """As what ``pipekern.profile`` gives."""

    names = ("a", "b")
    forward = (1.0, 2.0)
    backward = (2.0, 3.0)
    weight = (2.0, 3.0)


def test_measured_times_scale_with_samples() -> None:
    model = measured(Times(), samples=2, parameters=[7, 8], activations=[10, 20], outputs=[3, 5])
    assert model.layers(4, DEVICE) == [Layer("a", 2, 4, 4, 7, 20, 6), Layer("b", 4, 6, 6, 8, 40, 10)]
    assert measured(Times()).layers(1, DEVICE) == [Layer("a", 1, 2, 2), Layer("b", 2, 3, 3)]


def test_transformer_counts() -> None:
    """GPT-2 small: 12 blocks of 12·dim² weights each; 6 operations a weight and token forward and backward."""
    model = transformer(layers=12, dim=768, heads=12, vocab=50257, sequence=1024)
    blocks = model.rows[1:-1]
    assert len(blocks) == 12 and {row.parameters for row in blocks} == {12 * 768 * 768 + 4 * 768}
    total = sum(row.parameters for row in model.rows)
    assert total == pytest.approx(124e6 + 50257 * 768, rel=0.02)  # the output layer is counted by itself
    operations = sum(row.flops for row in model.rows) / 1024
    assert operations == pytest.approx(2 * 12 * 12 * 768**2 + 2 * 12 * 1024 * 768 + 2 * 50257 * 768)


def test_read() -> None:
    assert read({"transformer": SIZES}) == transformer(**SIZES)
    assert read({"layers": [{"name": "a", "flops": 3}], "width": 4}) == Estimated([Work("a", 3)], 4)
    row = {"name": "a", "forward": 1, "backward": 2, "weight": 3}
    assert read({"layers": [row], "samples": 8}) == Measured([Layer("a", 1, 2, 3)], 8)
    columns = {
        "names": ["a", "b"],
        "forward": [1.0, 2.0],
        "backward": [2.0, 3.0],
        "weight": [2.0, 3.0],
        "outputs": [3, 5],
    }
    assert read(columns) == measured(Times(), outputs=[3, 5])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "it needs 'transformer', 'layers', or 'names'"),
        ({"transformer": {"layers": 1}}, "cannot be read"),
        (
            {"layers": [{"name": "a", "forward": -1, "backward": 1, "weight": 1}]},
            "layer 'a': forward=-1 is not a finite",
        ),
        ({"layers": [{"name": "a", "flops": math.nan}]}, "layer 'a': flops=nan"),
        ({"names": ["a"], "forward": [1], "backward": [], "weight": [1]}, "backward has 0 values; there are 1 layers"),
        (
            {"transformer": SIZES | {"dim": 9, "heads": 6}},
            "heads=6 do not divide dim=9; nearest heads=3",
        ),
        ({"transformer": SIZES | {"layers": 0}}, "layers=0"),
    ],
)
def test_wrong_input(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(data)


def test_wrong_samples() -> None:
    with pytest.raises(ConfigError, match="samples=0: say how many"):
        Measured([], samples=0).layers(1, DEVICE)
