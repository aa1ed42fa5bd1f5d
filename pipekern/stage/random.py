"""Random numbers that do not depend on the schedule, on the split, or on recomputation.

Every unit's forward starts from a seed made of (seed, step, micro-batch, unit), so that dropout draws the same
mask however the model is cut and in whatever order micro-batches run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

_MASK = (1 << 64) - 1


def mix(*words: int) -> int:
    """A 63-bit hash of ``words``: splitmix64 finalisers, chained."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def layer_key(seed: int, index: int) -> int:
    """Seed of the initial weights of the lazy layer at position ``index``."""
    return mix(seed, 1, index)


def unit_keys(seed: int, microbatches: Iterable[int], units: Iterable[int]) -> list[list[int]]:
    """For each of ``microbatches`` the keys of ``units``; the step's own key is combined with it by exclusive or.

    Micro-batches are counted over the replicas: those of the second follow on those of the first.
    """
    indices = list(units)
    return [[mix(seed, 2, microbatch, unit) for unit in indices] for microbatch in microbatches]


def step_key(seed: int, step: int) -> int:
    """The part of every unit's key that changes from step to step."""
    return mix(seed, 3, step)


def generator(device: torch.device) -> torch.Generator:
    """The default generator of ``device``, which modules such as dropout draw from."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


@contextmanager
def preserved(devices: Iterable[torch.device]) -> Iterator[None]:
    """Give the default generators of ``devices`` their state back at the end: the user's numbers go on undisturbed."""
    generators = {id(g): g for g in map(generator, devices)}.values()
    states = [g.get_state() for g in generators]
    try:
        yield
    finally:
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)
