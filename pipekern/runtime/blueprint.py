"""What a pipeline will be, decided and checked before anything starts, and compared between ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from pipekern import schedule as schedules
from pipekern._version import __version__
from pipekern.errors import ConfigError
from pipekern.optim.store import PRECISIONS, Layout, low_precision
from pipekern.parallel.mesh import ALONE, Place
from pipekern.parallel.plan import Styles, choose_styles
from pipekern.plan.choose import choose
from pipekern.plan.offload import Offload
from pipekern.plan.partition import partition
from pipekern.runtime.costs import LayerCosts
from pipekern.runtime.layout import layouts_of, refuse_unheld
from pipekern.runtime.offloading import offloading
from pipekern.runtime.options import Options, Split
from pipekern.runtime.recomputation import recomputation
from pipekern.runtime.skips import Hop, hops, sent_directly
from pipekern.schedule.collectives import Collectives
from pipekern.schedule.comms import Edge, Program
from pipekern.schedule.ir import Schedule
from pipekern.stage.division import named_modules
from pipekern.stage.estimate import estimate, estimate_waiting
from pipekern.stage.sharing import Tie, find_ties, refuse_shared_state
from pipekern.stage.unit import Unit, cut


@dataclass(frozen=True)
class Blueprint:
    """``stages[s]`` are the units of stage s, ``first_unit[s]`` the index of its first.

    ``recompute[s]`` says what of each of them is made again. ``parameters`` gives every name its place in the model's
    order; names of one tied weight share theirs. ``given`` are the dtypes that the user's parameters have, ``dtypes``
    those that stages compute with where these are others, both by name. ``layouts[s]`` are the names of the trained
    parameters of stage s that lie together where a ``Store`` has them.
    """

    root: nn.Module
    schedule: Schedule
    train: Program
    evaluate: Program
    stages: list[list[Unit]]
    first_unit: list[int]
    recompute: list[list[str]]
    ties: list[Tie]
    parameters: dict[str, int]
    state: list[str]
    skips: tuple[Hop, ...]
    layouts: dict[int, Layout]
    dtypes: dict[str, torch.dtype]
    precision: torch.dtype | None
    offload: Offload
    styles: Styles
    given: dict[str, torch.dtype]

    @property
    def direct(self) -> dict[Edge, list[str]]:
        """By two stages: what goes from the first to the second past those between."""
        return sent_directly(self.skips)

    @property
    def units(self) -> list[Unit]:
        """All units, in the model's order."""
        return [unit for units in self.stages for unit in units]

    @property
    def root_rank(self) -> int:
        """The rank of the last stage, which knows the loss first."""
        return self.schedule.stage_rank[-1]

    def modules(self) -> Iterator[nn.Module]:
        """All modules of the model, of its root and its units; one that several have comes as often."""
        units = self.units
        for top in (self.root, *(unit.train for unit in units), *(unit.evaluate for unit in units)):
            yield from top.modules()

    def slots(self) -> dict[tuple[int, int], int]:
        """Slots of each link between stages: enough for training and for evaluation."""
        return {key: max(count, self.evaluate.slots.get(key, 1)) for key, count in self.train.slots.items()}

    def row(self) -> dict[str, Any]:
        """What every rank must agree on."""
        parameters = [pair for unit in self.units for pair in unit.named_parameters()]
        first = self.units[0]
        return {
            "schedule": self.schedule.name,
            "micro-batches": self.schedule.microbatches,
            "chunks": self.schedule.chunks,
            "order of instructions": str(self.schedule),
            "inputs": None if first.arguments is None else list(first.arguments.given),
            "split": [len(units) for units in self.stages],
            "recompute": self.recompute,
            "offload": str(self.offload.trips),
            "skips": list(map(str, self.skips)),
            "buckets": [self.layouts.get(stage) for stage in range(self.schedule.stages)],
            "tensor-parallel plan": [f"{name} {type(style).__name__}" for name, style in self.styles.items()],
            "parameters": [f"{name} {list(p.shape)}" for name, p in parameters],
            "tied weights": [[[rank, name] for rank, name in sorted(tie.names.items())] for tie in self.ties],
            "dtype": ", ".join(sorted({str(p.dtype) for _, p in parameters})),
            "version of pipekern": __version__,
        }


def draw(
    options: Options,
    ranks: int,
    sizes: Place = ALONE,
    bucket: int = 1 << 25,
    together: bool = True,
    model: tuple[nn.Module, list[Unit]] | None = None,
) -> Blueprint:
    """Check every option and cut the model. Raises ``ConfigError`` or ``ScheduleError`` before anything starts.

    ``sizes``: of the mesh. ``bucket``: the most bytes that go between replicas at once. ``together``: one process has
    all ranks. ``model``: the root and the units, where it is cut already.
    """
    replicas = sizes.dp
    root, units = model or cut(options.module, options.seed, options.inputs)
    _check_microbatches(options.microbatches)
    if options.schedule == "auto":
        order, counts = _chosen(options, units, ranks)
    else:
        order = _schedule(options.schedule, ranks, options.microbatches, options.chunks)
        counts = _split(options.split if options.counts is None else options.counts, units, order)
    starts = [sum(counts[:stage]) for stage in range(len(counts))]
    stages = [units[start : start + count] for start, count in zip(starts, counts, strict=True)]
    refuse_shared_state(stages)
    styles = _styles(options, units, sizes)
    skips = hops(stages, order, options.split if isinstance(options.split, LayerCosts) else None)
    direct = sent_directly(skips)
    place: dict[int, int] = {}
    named = [pair for unit in units for pair in unit.named_parameters()]
    parameters = {name: place.setdefault(id(p), len(place)) for name, p in named}
    precision = None if options.precision is None else PRECISIONS[options.precision]
    modules = (module for unit in units for module in unit.train.modules())
    dtypes = {} if precision is None else low_precision(named, modules, precision)
    layouts: dict[int, Layout] = {}
    if dtypes or replicas > 1:
        layouts = layouts_of(order, stages, dtypes, bucket, together)
    if options.zero == 3 and options.memory is not None:
        refuse_unheld(options, order, stages, dtypes, sizes, styles)
    buckets = {stage: len(layout) for stage, layout in layouts.items()} if replicas > 1 else {}
    program = order.program(direct, Collectives(buckets if options.zero else {}, buckets))
    recompute = recomputation(options, stages, skips, program)
    offload = offloading(options, stages, skips, program, recompute)
    state = list(root.state_dict()) or [unit.prefix + n for unit in units for n in unit.train.state_dict()]
    return Blueprint(
        root,
        order,
        offload.program(program),
        order.forward_only().program(direct),
        stages,
        starts,
        recompute,
        find_ties(stages, order.stage_rank),
        parameters,
        state,
        skips,
        layouts,
        dtypes,
        precision,
        offload,
        styles,
        {name: p.dtype for name, p in named},
    )


def _styles(options: Options, units: Sequence[Unit], sizes: Place) -> Styles:
    """How the modules of the tensor-parallel plan are divided."""
    if options.tensor_parallel is None:
        if sizes.tp > 1:
            raise ConfigError(
                f"mesh has tp={sizes.tp}, and tensor_parallel does not say which modules are in parts; give styles by "
                "module, or 'auto' for the plan of a Hugging Face model"
            )
        return {}
    return choose_styles(options.tensor_parallel, options.module, dict(named_modules(units)), sizes.tp)


def _check_microbatches(microbatches: object) -> None:
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        raise ConfigError(f"microbatches={microbatches!r}; a step needs a whole number of at least 1")


def unit_costs(split: Split, units: Sequence[Unit]) -> tuple[list[float], list[float], list[float]]:
    """What forward, backward and weight work of each unit cost, in any unit of measure: as given, else estimated."""
    if isinstance(split, LayerCosts):
        split.check(units)
        return list(split.forward), list(split.backward), list(split.weight)
    forward, weight = estimate(units), estimate_waiting(units)
    return forward, [2 * cost - late for cost, late in zip(forward, weight, strict=True)], weight  # two products each


def _chosen(options: Options, units: Sequence[Unit], ranks: int) -> tuple[Schedule, list[int]]:
    """The schedule and units a stage with the shortest simulated step, by the costs given or estimated."""
    if options.split is not None and not isinstance(options.split, LayerCosts):
        raise ConfigError(
            f"split={list(options.split)} with schedule='auto', which chooses the split itself; leave split out, give "
            "costs from pk.profile, or name a schedule"
        )
    forward, backward, weight = unit_costs(options.split, units)
    m = options.microbatches
    choice = choose(forward, backward, weight=weight, ranks=ranks, microbatches=m, chunks=options.chunks)
    return choice.schedule, list(choice.split)


def _schedule(schedule: str | Schedule, ranks: int, microbatches: int, chunks: int | None) -> Schedule:
    if isinstance(schedule, str):
        order = schedules.build(schedule, ranks=ranks, microbatches=microbatches, chunks=chunks)
    else:
        order = schedule
        if (order.ranks, order.microbatches) != (ranks, microbatches):
            raise ConfigError(
                f"the schedule {order.name!r} is for {order.ranks} ranks and {order.microbatches} micro-batches, the "
                f"pipeline has {ranks} and {microbatches}: build it for these"
            )
    if not order.runnable or not order.trains:
        ready = ", ".join(repr(name) for name in schedules.names() if schedules.describe(name).runnable)
        raise ConfigError(
            f"the schedule {order.name!r} can be simulated but not run yet: it must be synchronous, in one chain, "
            f"without slices; run one of {ready}"
        )
    order.check()
    return order


def _split(split: Split, units: Sequence[Unit], order: Schedule) -> list[int]:
    """Units a stage."""
    if len(units) < order.stages:
        raise ConfigError(
            f"the model has {len(units)} units to cut ({', '.join(unit.name for unit in units)}) for {order.stages} "
            f"stages ({order.ranks} ranks × {order.chunks} chunks); every stage needs one: use fewer ranks or chunks, "
            "or more layers"
        )
    if split is None or isinstance(split, LayerCosts):
        if split is not None:
            split.check(units)
        costs = estimate(units) if split is None else split.total()
        bounds = partition(costs, order.stages).bounds
        return [b - a for a, b in pairwise(bounds)]
    counts = list(split)
    if len(counts) != order.stages or sum(counts) != len(units) or min(counts) < 1:
        raise ConfigError(
            f"split={counts} gives {sum(counts)} units to {len(counts)} stages; it must give all {len(units)} units to "
            f"{order.stages} stages, at least one each (units: {', '.join(unit.name for unit in units)})"
        )
    return counts


def owned(blueprint: Blueprint, stages: Sequence[int]) -> set[int]:
    """Identities of the parameters that the units of ``stages`` hold."""
    return {id(p) for stage in stages for unit in blueprint.stages[stage] for _, p in unit.named_parameters()}


def free_others(blueprint: Blueprint, keep: set[int]) -> None:
    """Replace the parameters that are not in ``keep`` by ones without memory; tied ones stay tied."""
    # By the parameter itself, which so stays alive: an identity may be another's once it is gone.
    empty: dict[nn.Parameter, nn.Parameter] = {}
    for module in blueprint.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in keep:
                module._parameters[name] = empty.setdefault(parameter, _like(parameter, torch.device("meta")))


def bring_back(blueprint: Blueprint, stages: Sequence[int], device: torch.device) -> None:
    """Give the parameters of ``stages`` that have lost it a memory, on ``device``, without values."""
    units = [unit for stage in stages for unit in blueprint.stages[stage] if unit.build is None]
    lost = dict.fromkeys(p for unit in units for _, p in unit.named_parameters() if p.is_meta)
    made = {p: _like(p, device) for p in lost}
    for module in blueprint.modules():
        for name, parameter in module._parameters.items():
            if parameter in made:
                module._parameters[name] = made[parameter]


def _like(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    twin = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device), parameter.requires_grad)
    twin.grad_dtype = parameter.grad_dtype
    return twin
