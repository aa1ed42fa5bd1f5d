"""Units run one after the other, each from a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from pipekern.stage.random import generator
from pipekern.stage.recompute import Recomputed
from pipekern.stage.replay import Replay
from pipekern.stage.unit import Unit

Forward = Callable[[Sequence[int], Any], Any]  # of one seed a unit, and a value
_Run = Callable[[int, Any], Any]


def chain(
    units: Sequence[Unit],
    modules: Sequence[nn.Module],
    first: int,
    device: torch.device,
    recompute: Sequence[str] | None = None,
) -> Forward:
    """``units``, the first of them unit ``first`` of the model, as one function of their seeds and a value.

    ``modules`` are what they run, in training or in evaluation. ``recompute`` says of each unit what is made again in a
    backward; None: nothing, and random numbers come as they are.
    """
    calls = [unit.call(module) for unit, module in zip(units, modules, strict=True)]
    if recompute is None:
        runs: list[_Run] = [partial(_unseeded, call) for call in calls]
    else:
        seed = generator(device).manual_seed
        runs = [_run(*each, seed) for each in zip(recompute, calls, modules, strict=True)]
    skeleton = units[0].skeleton
    return partial(_in_turn, runs) if skeleton is None else Replay(skeleton, first, runs, device)


def _in_turn(runs: Sequence[_Run], keys: Sequence[int], value: Any) -> Any:
    for run, key in zip(runs, keys, strict=True):
        value = run(key, value)
    return value


def _run(recompute: str, call: Callable[[Any], Any], module: nn.Module, seed: Callable[[int], object]) -> _Run:
    return partial(_seeded, seed, call) if recompute == "none" else Recomputed(call, module, recompute, seed)


def _seeded(seed: Callable[[int], object], call: Callable[[Any], Any], key: int, value: Any) -> Any:
    seed(key)
    return call(value)


def _unseeded(call: Callable[[Any], Any], key: int, value: Any) -> Any:
    return call(value)
