"""The random states of this process: torch's on the CPU and on devices, Python's, numpy's."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipekern.stage.random import generator


def states(devices: Iterable[torch.device]) -> dict[str, Tensor]:
    """torch's states, uint8: of the CPU, and of the CUDA devices among ``devices`` by their order."""
    return {name: source.get_state() for name, source in _generators(devices).items()}


def numbers() -> dict[str, Any]:
    """Python's and numpy's global states as JSON."""
    version, words, gauss = random.getstate()
    numpy = dict(np.random.get_state(legacy=False))
    words_of_numpy = {key: np.asarray(value).tolist() for key, value in numpy["state"].items()}
    return {"python": [version, list(words), gauss], "numpy": numpy | {"state": words_of_numpy}}


def restore(devices: Iterable[torch.device], tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Set what :func:`states` and :func:`numbers` gave. A device that was not there then goes on as it is."""
    for name, source in _generators(devices).items():
        if name in tensors:
            source.set_state(tensors[name].clone())
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(values["numpy"])


def _generators(devices: Iterable[torch.device]) -> dict[str, torch.Generator]:
    cuda = [device for device in devices if device.type == "cuda"]
    return {"cpu": torch.default_generator} | {f"cuda/{i}": generator(device) for i, device in enumerate(cuda)}
