"""Layers on the way to other ranks, when the split or the schedule changes between two steps.

A new assembly is made beside the one that runs, from the units that there are, with links of its own. What a rank gets
comes over links between the two ranks; what stays where memory is laid out anew is copied, all else is left alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipekern.errors import ConfigError, ScheduleError
from pipekern.runtime import saving
from pipekern.runtime.assembly import Assembly
from pipekern.runtime.blueprint import Blueprint, bring_back, free_others, owned
from pipekern.runtime.names import Names
from pipekern.runtime.optimizer_state import OptimizerState
from pipekern.runtime.options import Options
from pipekern.runtime.outgoing import MOVE_TAG
from pipekern.runtime.start import agreed, assembled, compared
from pipekern.transport.world import World, join

_CHUNK = 1 << 20  # bytes of a message, that a cache holds; links keep slots of the largest one that they have carried
_PARAMETER = -1


class Move(NamedTuple):
    """What ``Pipeline.replan`` did: units a stage ``before`` and ``after``, the ``bytes`` sent between all ranks, and
    the ``seconds`` that the slowest took.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    bytes: int
    seconds: float


class Item(NamedTuple):
    """What goes as one: a parameter, by its first name and ``unit`` -1, with its gradient and what an optimizer keeps
    for it; or a buffer of a unit.
    """

    unit: int
    name: str


Kept = dict[str, Tensor]  # "value", "gradient", and "/" with a key of the optimizer's state


class Proposal(NamedTuple):
    """What all ranks have agreed on, and nothing has changed yet."""

    options: Options
    blueprint: Blueprint
    world: World | None


def propose(before: Assembly, options: Options, optimizer: torch.optim.Optimizer | None) -> Proposal:
    """What ``before`` shall become, once all ranks have said the same. Raises ``ConfigError`` or ``ScheduleError`` on
    all of them alike, where nothing has changed. Collective.
    """

    def checked() -> tuple[None, dict[str, Any]]:
        options.check()
        refuse(before, optimizer)
        return None, {}

    world = None if before.rank is None else join(options.transport, options.timeout, before.transport.check)
    try:
        compared(world, checked)
        return Proposal(*agreed(options, world, before.site, before), world)
    except BaseException as error:
        if world is not None:
            if not isinstance(error, ConfigError | ScheduleError):
                world.abort(error, f"rank {world.rank}, about another split")
            world.close()
        raise


def refuse(before: Assembly, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise ``ConfigError`` where layers cannot move."""
    if before.division is not None:
        raise ConfigError(
            "a pipeline with tensor_parallel keeps its split and schedule: save, and load into one with others"
        )
    if optimizer is None and (before.rank is not None or before.store is not None):
        raise ConfigError(
            "the parameters of this process become others with another split, and no optimizer would know; make it by "
            "pipe.optimizer(cls, ...)"
        )


def move(
    before: Assembly, proposal: Proposal, optimizer: torch.optim.Optimizer | None, began: float
) -> tuple[Assembly, Move]:
    """The assembly that goes on where ``before`` stops, and what was done since ``began`` on the clock of
    ``perf_counter``. Collective; where it raises, both are of no use any more.
    """
    options, blueprint, world = proposal
    site, names = before.site, Names.of(blueprint)
    old, new = _holders(before.blueprint, names), _holders(blueprint, names)
    routes = {item: (min(old[item]), sorted(new[item] - old[item])) for item in new}
    pairs = {(source, target) for source, targets in routes.values() for target in targets}
    state = saving.state_of(before, names, optimizer)
    numbers = {} if state is None else state.row()
    in_place = before.store is None  # then what is here already stays as it is
    stays = {item for item in new if in_place and site.rank in (None, *(new[item] & old[item]))}
    items = _items(before, names, state)
    if site.rank is not None:
        here = blueprint.schedule.stages_of(site.rank)
        free_others(blueprint, owned(blueprint, here))
        bring_back(blueprint, here, site.own[site.rank])
    after = assembled(options, world, site, blueprint, dict(before.numbered()), sorted(pairs))
    try:
        sent = _exchange(after, routes, items)
        _settle(after, names, items, stays, numbers, optimizer)
        told = _chained(after.star.everywhere([(sent, time.perf_counter() - began)]))
        old_split, split = (tuple(map(len, parts.blueprint.stages)) for parts in (before, after))
        return after, Move(old_split, split, sum(each for each, _ in told), max(seconds for _, seconds in told))
    except BaseException as error:
        after.transport.abort(error, f"rank {after.star.number}, while layers moved")
        after.transport.close()
        raise


def _holders(blueprint: Blueprint, names: Names) -> dict[Item, set[int]]:
    """The ranks that have each item, in the model's order."""
    found: dict[Item, set[int]] = {}
    for stage, units in enumerate(blueprint.stages):
        for index, unit in enumerate(units, blueprint.first_unit[stage]):
            own = [Item(_PARAMETER, names.first[name]) for name, _ in unit.named_parameters()]
            for item in [*own, *(Item(index, name) for name, _ in unit.train.named_buffers())]:
                found.setdefault(item, set()).add(blueprint.schedule.stage_rank[stage])
    return found


def _items(parts: Assembly, names: Names, state: OptimizerState | None) -> dict[Item, Kept]:
    """All that this process has, whole, and taken out of flat memory; collective with shards."""
    found: dict[Item, Kept] = {}
    store = parts.store
    laid = {} if store is None else store.whole(lambda piece: piece.parameter.detach())
    gradients = {} if store is None else store.gradients(lambda own: _chained(parts.star.everywhere(own)))
    for name, p in [pair for unit in parts.units() for pair in unit.named_parameters()]:
        grad = gradients.get(name) if name in laid else p.grad
        kept = found.setdefault(Item(_PARAMETER, names.first[name]), {"value": laid.get(name, p.detach())})
        if grad is not None:
            kept["gradient"] = grad
    for name, key, value in () if state is None else saving.moments(parts, names, state):
        if (item := Item(_PARAMETER, name)) in found:
            found[item][f"/{key}"] = value
    for index, unit in parts.numbered():
        found |= {Item(index, name): {"value": buffer} for name, buffer in unit.train.named_buffers()}
    if store is not None:
        store.give_back(laid)
    return found


def _chained(rows: list[list[Any]]) -> list[Any]:
    """What all ranks of all pipelines have told, in one list."""
    return [value for pipeline in rows for own in pipeline for value in own]


def _exchange(after: Assembly, routes: Mapping[Item, tuple[int, list[int]]], items: dict[Item, Kept]) -> int:
    """Send what others get, and add to ``items`` what this rank gets. Returns the bytes sent."""
    rank, outgoing, sent = after.rank, after.outgoing, 0
    for number, (item, (source, targets)) in enumerate(routes.items()):
        for target in targets if source == rank else ():
            sender, kept = after.senders[f"move {source}>{target}"], items[item]
            head = [[key, str(value.dtype).removeprefix("torch."), list(value.shape)] for key, value in kept.items()]
            outgoing.send(sender, MOVE_TAG | number, head)
            for value in kept.values():
                for chunk in _bytes(value).split(_CHUNK):
                    outgoing.send(sender, MOVE_TAG | number, chunk)
                sent += value.nbytes
    for number, (item, (source, targets)) in enumerate(routes.items()):
        if rank in targets:
            receiver, kept = after.receivers[f"move {source}>{rank}"], {}
            for key, dtype, shape in outgoing.receive(receiver, MOVE_TAG | number).value:
                kept[key] = torch.empty(shape, dtype=getattr(torch, dtype), device=after.site.own[rank])
            for value in kept.values():
                for chunk in _bytes(value).split(_CHUNK):
                    chunk.copy_(outgoing.receive(receiver, MOVE_TAG | number).value)
            items[item] = kept
    outgoing.drain()
    return sent


def _bytes(value: Tensor) -> Tensor:
    """A view of a tensor that is contiguous, else a copy."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


@torch.no_grad()
def _settle(
    parts: Assembly,
    names: Names,
    items: Mapping[Item, Kept],
    stays: set[Item],
    numbers: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Give the units of ``parts`` and the optimizer what is theirs of ``items``; what ``stays`` is where it was."""
    for name, p in [pair for unit in parts.units() for pair in unit.named_parameters()]:
        if (item := Item(_PARAMETER, names.first[name])) not in stays:
            p.data = items[item]["value"].to(p.device)
    for index, unit in parts.numbered():
        for name, buffer in unit.train.named_buffers():
            buffer.copy_(items[Item(index, name)]["value"])
    parts.lay_out()
    own = {names.first[name]: (name, p) for name, p in parts.parameters.items()}
    arrived = {name: row for name, row in own.items() if Item(_PARAMETER, name) not in stays}
    changed = {first: p for first, (_, p) in own.items()}
    state = None if optimizer is None else _rebound(parts, optimizer, numbers, changed)
    for first, (name, p) in arrived.items():
        kept = {key: _part(parts, name, value) for key, value in items[Item(_PARAMETER, first)].items()}
        if "gradient" in kept:
            p.grad = kept["gradient"]
        if state is not None:
            for key in kept.keys() - {"value", "gradient"}:
                state.put(first, key.removeprefix("/"), kept[key])


def _part(parts: Assembly, name: str, value: Tensor) -> Tensor:
    return value if parts.store is None else parts.store.part_of(name, value).clone()


def _rebound(
    parts: Assembly, optimizer: torch.optim.Optimizer, numbers: Mapping[str, Any], own: Mapping[str, nn.Parameter]
) -> OptimizerState:
    """``optimizer`` over its ``own`` parameters, each in the group in which it was on any rank; collective."""
    told = parts.star.everywhere(json.dumps(numbers))
    rows = [json.loads(text) for pipeline in told for text in pipeline]
    group_of = {name: index for row in rows for index, group in enumerate(row["names"]) for name in group}
    for index, group in enumerate(optimizer.param_groups):
        group["params"] = [p for name, p in own.items() if group_of[name] == index]
    state = {p: _near(p, optimizer.state[p]) for p in own.values() if p in optimizer.state}
    optimizer.state.clear()
    for name, kept in [pair for row in rows for pair in row["state"].items() if pair[0] in own]:
        optimizer.state[own[name]] = state.get(own[name], dict(kept))
    return OptimizerState(optimizer, {id(p): name for name, p in own.items()})


def _near(parameter: nn.Parameter, kept: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer keeps, on the device of its parameter, as far as it is like it."""
    alike = {key for key, value in kept.items() if isinstance(value, Tensor) and value.shape == parameter.shape}
    return {key: value.to(parameter.device) if key in alike else value for key, value in kept.items()}
