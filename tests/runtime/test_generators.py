"""Random numbers go on where they were."""

from __future__ import annotations

import json
import random

import numpy as np
import torch

from pipekern.checkpoint.manifest import check_json
from pipekern.runtime.generators import numbers, restore, states


def _draw() -> list[float]:
    return [
        *torch.randn(3).tolist(), random.random(), random.gauss(0, 1), *np.random.normal(size=3).tolist(),
        float(np.random.randint(1000)),
    ]  # fmt: skip


def test_all_draw_on_as_they_did(seed: int) -> None:
    """Also the second half of a pair of normal numbers, which Python and numpy keep."""
    random.seed(seed)
    np.random.seed(seed)
    random.gauss(0, 1)
    np.random.normal()
    tensors, row = states([torch.device("cpu")]), numbers()
    check_json(row, "row")
    want = _draw()
    assert _draw() != want
    restore([torch.device("cpu")], tensors, json.loads(json.dumps(row)))
    assert _draw() == want


def test_a_device_that_was_not_there_is_left_alone() -> None:
    tensors, row = states([]), numbers()
    assert list(tensors) == ["cpu"]
    restore([torch.device("cpu")], {}, row)
