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
Way = tuple[Sequence[nn.Module], Sequence[str] | None]
_Run = Callable[[int, Any], Any]


def chains(units: Sequence[Unit], first: int, device: torch.device, *ways: Way) -> list[Forward]:
    """``units``, the first of them unit ``first`` of the model, as functions of their seeds and a value.

    A way is what each unit runs (its module in training, or in evaluation), and what of each is made again in a
    backward; None: nothing, and random numbers come as they are.
    """
    rows = [_runs(units, *way, device) for way in ways]
    skeleton = units[0].skeleton
    if skeleton is None:
        return [partial(_in_turn, runs) for runs in rows]
    replay = Replay(skeleton, first, units[0].train, len(units), device)
    return [partial(replay, runs) for runs in rows]


def _in_turn(runs: Sequence[_Run], keys: Sequence[int], value: Any) -> Any:
    for run, key in zip(runs, keys, strict=True):
        value = run(key, value)
    return value


def _runs(
    units: Sequence[Unit], modules: Sequence[nn.Module], recompute: Sequence[str] | None, device: torch.device
) -> list[_Run]:
    calls = [unit.call(module) for unit, module in zip(units, modules, strict=True)]
    if recompute is None:
        return [partial(_unseeded, call) for call in calls]
    seed = generator(device).manual_seed
    return [
        partial(_seeded, seed, call) if how == "none" else Recomputed(call, module, how, seed)
        for how, call, module in zip(recompute, calls, modules, strict=True)
    ]


def _seeded(seed: Callable[[int], object], call: Callable[[Any], Any], key: int, value: Any) -> Any:
    seed(key)
    return call(value)


def _unseeded(call: Callable[[Any], Any], key: int, value: Any) -> Any:
    return call(value)
