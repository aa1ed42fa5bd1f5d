"""What a pipeline saves, under names that no split changes, and how it goes on from there.

A file holds one unit of the model: ``model/<name>``, and ``optimizer/<name>/<state>`` of each of its parameters, under
the names of the original module; what is tied is saved once, under its first name. A file a process holds its random
states.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipekern.checkpoint.agree import Gather, together
from pipekern.checkpoint.load import Checkpoint
from pipekern.checkpoint.save import Shard
from pipekern.checkpoint.save import save as save_shards
from pipekern.errors import CheckpointError
from pipekern.optim.scale import LossScale
from pipekern.parallel.tensor import whole
from pipekern.runtime import generators
from pipekern.runtime.assembly import Assembly
from pipekern.runtime.collective import Star
from pipekern.runtime.names import Names
from pipekern.runtime.optimizer_state import OptimizerState

Folder = str | os.PathLike[str]
Optimizer = torch.optim.Optimizer | None
Sources = dict[str, Callable[[], Tensor]]  # by key
Targets = list[tuple[str, Callable[[Tensor], object]]]  # key, and what takes its tensor


def sources(parts: Assembly, names: Names, optimizer: OptimizerState | None) -> dict[int, Sources]:
    """By unit that this process saves: what gives the whole tensor of each key. Collective where parameters are in
    shards, which are put together now, all of them.
    """
    files: dict[int, Sources] = {index: {} for index, _ in parts.numbered()}
    state = parts.state()
    for index, name, value in _state(parts, names):
        if names.unit.get(name) == index:
            files[index][f"model/{name}"] = state.get(name, value).detach
    for name, key, value in () if optimizer is None else moments(parts, names, optimizer):
        if names.unit[name] in files:
            files[names.unit[name]][_optimizer_key(name, key)] = value.detach
    return files if parts.star.pipeline == 0 else {}  # other replicas have the same


def moments(parts: Assembly, names: Names, optimizer: OptimizerState) -> list[tuple[str, str, Tensor]]:
    """What ``optimizer`` keeps, by parameter and key, whole; collective with shards."""
    own = [(name, key, whole(value)) for name, key, value in optimizer.tensors()]
    store = parts.store
    if store is None or not parts.zero:
        return own
    split = {(n, k) for n, k, value in own if value.dim() and value.shape == optimizer.parameter(n).shape}
    rest = [row for row in own if row[:2] not in split]  # such as the number of steps
    rows = [row for pipeline in parts.star.everywhere((sorted(split), rest)) for row in pipeline]
    found = list({(name, key): (name, key, value) for _, others in rows for name, key, value in others}.values())
    there = {(name, key) for shards, _ in rows for name, key in shards}
    for key in sorted({key for _, key in there}):
        laid = store.whole(lambda piece, key=key: optimizer.of(piece.parameter, key))  # type: ignore[misc]
        first = {names.first[name]: value for name, value in laid.items()}
        found += [(name, key, whole(value)) for name, value in first.items() if (name, key) in there]
    return found


def targets(parts: Assembly, names: Names, optimizer: OptimizerState | None, checkpoint: Checkpoint) -> Targets:
    """What this process takes out of ``checkpoint``: some of it to several places."""
    state = {name for _, name, _ in _state(parts, names)}
    found: Targets = [(f"model/{names.first[name]}", partial(parts.put, name)) for name in state]
    for key in checkpoint.entries:
        kind, _, rest = key.partition("/")
        name, _, kept = rest.rpartition("/")
        if kind == "optimizer" and optimizer is not None and name in optimizer:
            found.append((key, partial(_put_part, parts, optimizer, name, kept)))
    return found


def _put_part(parts: Assembly, optimizer: OptimizerState, name: str, key: str, value: Tensor) -> None:
    optimizer.put(name, key, value if parts.store is None else parts.store.part_of(name, value))


def save(
    parts: Assembly, optimizer: Optimizer, scale: LossScale | None, step: int, seed: int, folder: Folder, data: Any
) -> None:
    """See ``Pipeline.save``."""
    rank, gather = parts.star.number, gather_of(parts.star)
    names = Names.of(parts.blueprint)
    kept: list[OptimizerState | None] = []
    together(lambda: kept.append(state_of(parts, names, optimizer)), gather)
    (own,) = kept
    files = sources(parts, names, own)

    def values() -> dict[str, Any]:
        state = None if own is None else own.row()
        row = {"step": step, "seed": seed, "data": data, "ties": names.ties}
        row["loss scale"] = None if scale is None else scale.state()
        return {**row, "optimizer": state, "random": generators.numbers()}

    def shards() -> Iterator[Shard]:
        yield from shards_of(files)
        states = generators.states(parts.devices)
        yield f"random-{rank:05d}", lambda: {_random_key(rank, name): state for name, state in states.items()}

    save_shards(folder, shards(), values, rank=rank, gather=gather)


def load(parts: Assembly, optimizer: Optimizer, scale: LossScale | None, seed: int, folder: Folder) -> tuple[int, Any]:
    """Steps taken and ``data``; see ``Pipeline.load``."""
    rank, names = parts.star.number, Names.of(parts.blueprint)
    kept: list[OptimizerState | None] = []

    def find(checkpoint: Checkpoint) -> tuple[Targets, list[str]]:
        kept.append(state_of(parts, names, optimizer))
        _refuse([*_differences(parts, names, checkpoint), *_strange(kept[0], seed, checkpoint)], folder)
        random = _random_key(_source(rank, checkpoint), "")
        return targets(parts, names, kept[0], checkpoint), [key for key in checkpoint.entries if key.startswith(random)]

    checkpoint, mine = _agreed(parts, folder, find)
    _apply(parts, checkpoint, kept[0], mine, _source(rank, checkpoint))
    gather_of(parts.star)(None)  # a rank that fails from here on aborts the job: nobody goes on with half of it
    values = checkpoint.values
    if scale is not None and values[0]["loss scale"] is not None:
        scale.load(values[0]["loss scale"])
    return values[0]["step"], values[_source(rank, checkpoint)]["data"]


def load_weights(parts: Assembly, folder: Folder) -> Any:
    """``data``; see ``Pipeline.load_weights``."""
    names = Names.of(parts.blueprint)

    def find(checkpoint: Checkpoint) -> tuple[Targets, list[str]]:
        _refuse([*_differences(parts, names, checkpoint)], folder)
        return targets(parts, names, None, checkpoint), []

    checkpoint, mine = _agreed(parts, folder, find)
    _put(checkpoint, mine)
    gather_of(parts.star)(None)
    return checkpoint.values[_source(parts.star.number, checkpoint)]["data"]


def _agreed(
    parts: Assembly, folder: Folder, find: Callable[[Checkpoint], tuple[Targets, list[str]]]
) -> tuple[Checkpoint, Targets]:
    """The checkpoint in ``folder`` and what this process takes out of it, once every process has compared its part with
    the digests. ``find`` says what, and which keys it needs besides.
    """
    ready: list[tuple[Checkpoint, Targets]] = []

    def check() -> str:
        checkpoint = Checkpoint(folder)
        mine, besides = find(checkpoint)
        checkpoint.verify([*(key for key, _ in mine), *besides])
        ready.append((checkpoint, mine))
        return checkpoint.digest

    if len(set(together(check, gather_of(parts.star)))) > 1:
        raise CheckpointError(f"the ranks read different checkpoints in {folder}; all must see one file system")
    return ready[0]


def gather_of(star: Star) -> Gather:
    def gather(row: Any) -> list[Any]:
        text = torch.frombuffer(bytearray(json.dumps(row).encode()), dtype=torch.uint8)
        rows = [other for pipeline in star.everywhere(text) for other in pipeline]
        return [row] if star.alone else [json.loads(other.cpu().numpy().tobytes()) for other in rows]

    return gather


def _state(parts: Assembly, names: Names) -> list[tuple[int, str, Tensor]]:
    """This process's parameters and buffers: unit, name, value. What several units use comes with each of them: of a
    buffer they may have copies.

    Raises ``CheckpointError`` for state that is no tensor.
    """
    rows = [(index, name, value) for index, unit in parts.numbered() for name, value in unit.state().items()]
    state = [row for row in rows if row[1] in names.first]
    extra = [name for _, name, value in state if not isinstance(value, Tensor)]
    if extra:
        raise CheckpointError(f"{', '.join(extra)}: state that is no tensor; hold it in buffers, or give it as data")
    return state


def state_of(parts: Assembly, names: Names, optimizer: Optimizer) -> OptimizerState | None:
    """What ``optimizer`` keeps, under the first names of parameters."""
    own = {id(parameter): names.first[name] for name, parameter in parts.parameters.items()}
    return None if optimizer is None else OptimizerState(optimizer, own)


def shards_of(files: dict[int, Sources]) -> Iterator[Shard]:
    for index, entries in files.items():
        if entries:
            yield f"unit-{index:05d}", partial(_called, entries)


def _called(entries: Sources) -> dict[str, Tensor]:
    return {key: get() for key, get in entries.items()}


def _optimizer_key(name: str, state: str) -> str:
    if "/" in state:
        raise CheckpointError(f"the optimizer's state {state!r} has a slash in its name; a key could not be told apart")
    return f"optimizer/{name}/{state}"


def _random_key(rank: int, name: str) -> str:
    return f"random/{rank}/{name}"


def _source(rank: int, checkpoint: Checkpoint) -> int:
    """The rank that saved what is this one's alone."""
    return rank if rank < len(checkpoint.values) else 0


def _differences(parts: Assembly, names: Names, checkpoint: Checkpoint) -> Iterator[str]:
    """In parameters and buffers."""
    saved = {key.removeprefix("model/") for key in checkpoint.entries if key.startswith("model/")}
    yield from (f"{name} is not in the checkpoint" for name in names.unit if name not in saved)
    yield from (f"{name} is in the checkpoint, not in the model" for name in sorted(saved) if name not in names.unit)
    described = {} if parts.store is None else parts.store.described()
    for name, value in {name: value for _, name, value in _state(parts, names)}.items():
        if names.first[name] == name and name in saved:
            value = described.get(name, value)
            there = str(checkpoint.entries[f"model/{name}"])
            here = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            if there != here:
                yield f"{name} is {there} in the checkpoint, {here} here"
    ties = checkpoint.values[0]["ties"]
    for name in sorted(names.ties.keys() | ties.keys()):
        there, here = ties.get(name, "nothing"), names.ties.get(name, "nothing")
        if there != here:
            yield f"{name} is tied to {there} in the checkpoint, to {here} here"


def _strange(optimizer: OptimizerState | None, seed: int, checkpoint: Checkpoint) -> Iterator[str]:
    """In what is not the model's."""
    values = checkpoint.values[0]
    if values["seed"] != seed:
        yield f"seed is {values['seed']} in the checkpoint, {seed} here"
    if optimizer is not None and values["optimizer"] is not None:
        yield from optimizer.differences([row["optimizer"] for row in checkpoint.values])
    elif optimizer is not None:
        yield "the checkpoint has no state of an optimizer, this pipeline has an optimizer: make it after load"
    elif values["optimizer"] is not None:
        kind = values["optimizer"]["class"]
        yield (
            f"the checkpoint has the state of {kind}, this pipeline has no optimizer: call pipe.optimizer(...) first, "
            "or pipe.load_weights, which takes parameters and buffers alone"
        )


def _refuse(differences: Iterable[str], folder: Folder) -> None:
    lines = [f"  * {line}" for line in differences]
    if lines:
        raise CheckpointError(
            "\n".join([f"the checkpoint in {folder} is not of this pipeline:", *lines])
            + "\nmake the pipeline as it was when it was saved (ranks, split and schedule may differ)"
        )


def _apply(
    parts: Assembly, checkpoint: Checkpoint, optimizer: OptimizerState | None, mine: Targets, source: int
) -> None:
    if optimizer is not None:
        optimizer.restore([row["optimizer"] for row in checkpoint.values])
    _put(checkpoint, mine)
    prefix = _random_key(source, "")
    states = {key.removeprefix(prefix): checkpoint.tensor(key) for key in checkpoint.entries if key.startswith(prefix)}
    generators.restore(parts.devices, states, checkpoint.values[source]["random"])


def _put(checkpoint: Checkpoint, mine: Targets) -> None:
    with torch.no_grad():
        for key, put in mine:
            put(checkpoint.tensor(key))
