"""The parts of a running pipeline, put together from its blueprint: stages on devices, links, executors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pipekern.errors import TransportError
from pipekern.optim.store import Store
from pipekern.parallel.tensor import local, part_of, whole
from pipekern.runtime.batch import Batch
from pipekern.runtime.blueprint import Blueprint
from pipekern.runtime.collective import Star
from pipekern.runtime.deltas import Deltas, Ties
from pipekern.runtime.detours import Detours
from pipekern.runtime.executor import Executor
from pipekern.runtime.generate import Generator
from pipekern.runtime.head_loss import choose_head
from pipekern.runtime.lane import Ends, Lane
from pipekern.runtime.loss import Loss, Verdict
from pipekern.runtime.options import Options
from pipekern.runtime.outgoing import LOSS_TAG, Outgoing
from pipekern.runtime.runner import Held, Runner
from pipekern.runtime.site import Site
from pipekern.runtime.slices import Slices
from pipekern.stage.division import Division
from pipekern.stage.host import Host
from pipekern.stage.offload import Offload
from pipekern.stage.random import preserved, unit_keys
from pipekern.stage.stage import Stage
from pipekern.stage.unit import Unit
from pipekern.transport.base import Receiver, Sender, Transport

_TRAIN = {
    "RECV_F": "receive_forward", "F": "forward", "SEND_F": "send_forward",
    "RECV_B": "receive_backward", "B": "backward_input", "W": "backward_weight", "BW": "backward",
    "SEND_B": "send_backward", "AWAY": "put_away", "BACK": "bring_back",
    "GATHER": "begin_gather", "JOIN": "join", "REDUCE": "begin_reduce",
}  # fmt: skip
_EVALUATE = {"RECV_F": "receive_evaluate", "F": "evaluate", "SEND_F": "send_evaluate"}


class Assembly:
    """The stages of this process and everything that runs them. ``rank`` is None where one process has every rank."""

    def __init__(
        self,
        blueprint: Blueprint,
        site: Site,
        stages: Mapping[int, Stage],
        loss_fn: Callable[[Any, Any], Any],
        loss_path: str,
        codecs: Mapping[str, str],
        transport: Transport,
        senders: Mapping[str, Sender],
        receivers: Mapping[str, Receiver],
        zero: int = 0,
        division: Division | None = None,
    ):
        self.site, self.replicas, self.zero, self.division = site, site.replicas, zero, division
        self.place, self.sizes, self.rank = site.place, site.grid.sizes, site.rank
        self.store: Store | None = None
        self.blueprint, self.stages, self.transport = blueprint, stages, transport
        self.loss_path, self.codecs = loss_path, codecs
        last = stages.get(blueprint.schedule.stages - 1)
        self.loss = Loss(loss_fn, None if last is None else last.head, blueprint.precision is not None)
        self.senders, self.receivers = senders, receivers
        self.outgoing = Outgoing(transport, self.receivers.values(), alone=self.rank is None)
        schedule = blueprint.schedule
        star = (site.pipeline, len(site.homes))
        self.star = Star(self.rank, schedule.ranks, blueprint.root_rank, self.outgoing, senders, receivers, *star)
        self.parameters: dict[str, nn.Parameter] = dict(p for unit in self.units() for p in unit.named_parameters())
        self.ties = Ties(self.rank, blueprint.ties, self.parameters, self.outgoing, senders, receivers)
        self._held = {schedule.stage_rank[index]: Held() for index in stages}
        self._runners = {index: self._runner(stage) for index, stage in stages.items()}
        for a, b in [*pairwise(range(schedule.stages)), *blueprint.direct]:
            if schedule.stage_rank[a] == schedule.stage_rank[b] and a in self._runners:
                one, other = self._runners[a].lane(b), self._runners[b].lane(a)
                one.next, other.previous = other, one
        self.train = Executor(self._runners, blueprint.train, self.rank, _TRAIN, self.outgoing, self._publish)
        self.evaluate = Executor(self._runners, blueprint.evaluate, self.rank, _EVALUATE, self.outgoing, self._publish)
        layers = [m for units in blueprint.stages for unit in units for m in unit.evaluate.modules()]
        self.generator = Generator(self._runners, schedule, self.rank, self.star, self.outgoing, layers, blueprint.root)
        self._verdict: Verdict | None = None

    def _runner(self, stage: Stage) -> Runner:
        schedule, index = self.blueprint.schedule, stage.index
        before, after = schedule.previous_stage(index), schedule.next_stage(index)
        return Runner(
            stage,
            self._ends(before, index, after),
            self._detours(stage),
            self.outgoing,
            self.loss if after is None else None,
            self._held[schedule.stage_rank[index]],
        )

    def _ends(self, before: int | None, index: int, after: int | None) -> Ends:
        return Ends(
            self.receivers.get(f"{before}>{index}"),
            self.senders.get(f"{index}>{after}"),
            self.receivers.get(f"{after}>{index}"),
            self.senders.get(f"{index}>{before}"),
            self._slices(before, index),
            self._slices(index, after),
        )

    def _slices(self, before: int | None, after: int | None) -> Slices | None:
        """Of the messages between two stages, where that saves bytes between hosts."""
        home = self.blueprint.schedule.stage_rank
        if self.division is None or before is None or after is None:
            return None
        pair = min(home[before], home[after]), max(home[before], home[after])
        return Slices(self.division.parts) if pair in self.site.apart else None

    def _detours(self, stage: Stage) -> Detours | None:
        direct, index = self.blueprint.direct, stage.index

        def lane(before: int | None, after: int | None) -> Lane:
            return Lane(stage.device, self._ends(before, index, after), self.outgoing)

        arriving = {a: lane(a, None) for a, b in direct if b == index}
        leaving = {b: lane(None, b) for a, b in direct if a == index}
        names = {b: names for (a, b), names in direct.items() if a == index}
        return Detours(arriving, leaving, names) if arriving or leaving else None

    def equalise(self) -> None:
        """Make copies of one weight equal over ranks and replicas; collective."""
        self.ties.equalise()
        if self.replicas is not None:
            for tensor in {id(t): t for unit in self.units() for t in unit.state().values()}.values():
                self.replicas.equalise(local(tensor.detach()))

    def lay_out(self) -> None:
        """Lay the parameters out as optimizers see them."""
        blueprint = self.blueprint
        if blueprint.layouts:
            named = {
                i: [p for unit in stage.units for p in unit.named_parameters()] for i, stage in self.stages.items()
            }
            self.store = Store(named, blueprint.layouts, blueprint.dtypes, self.replicas, self.zero)
            self.parameters = self.store.parameters
            self.ties.hold(self.parameters)
            for runner in self._runners.values():
                runner.store = self.store

    def over_replicas(self, value: float) -> float:
        """On the rank of the last stage: the sum of ``value`` over the replicas."""
        return sum(self.star.of_roots(value)[self.place.tp :: self.sizes.tp])

    def _publish(self, batch: Batch) -> None:
        self._verdict = self.loss.result()
        if self.star.rank is not None and self.star.pipelines == 1:
            self.star.publish(LOSS_TAG | batch.tag, self._verdict.encode())

    def verdict(self, batch: Batch) -> Verdict:
        """The loss of the step that has just run: computed here, or received from the last stage."""
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return Verdict.decode(self.star.receive(LOSS_TAG | batch.tag))
        if self.star.pipelines > 1:
            rows = self.star.of_roots(verdict.encode())[:: self.sizes.tp]  # of the first parts: the same bits on all
            verdict = Verdict.over([Verdict.decode(row) for row in rows])
            self.star.publish(LOSS_TAG | batch.tag, verdict.encode())
        return verdict

    def of_parameters(self, value: Any) -> list[Any]:
        """``value`` of every rank that has parameters which no other has; collective."""
        if not self.zero and self.division is None:
            return self.star.gather(value)
        pipelines, parts = self.star.everywhere(value), self.sizes.tp
        if not self.zero:
            pipelines = pipelines[self.place.dp * parts : (self.place.dp + 1) * parts]
        return [row for rows in pipelines for row in rows]

    @property
    def devices(self) -> list[torch.device]:
        """The devices of this process's stages, each once."""
        return list(dict.fromkeys(stage.device for stage in self.stages.values()))

    def units(self) -> list[Unit]:
        """The units of this process's stages, in the model's order."""
        return [unit for stage in self.stages.values() for unit in stage.units]

    def numbered(self) -> Iterator[tuple[int, Unit]]:
        """The units of this process's stages with their indices in the model."""
        for index, stage in self.stages.items():
            yield from enumerate(stage.units, self.blueprint.first_unit[index])

    def state(self) -> dict[str, Tensor]:
        """This process's parameters, as an optimizer sees them but whole, and buffers, by name in the model; collective
        where parameters are in shards or parts.
        """
        known = set(self.blueprint.state)
        own = {name: value for unit in self.units() for name, value in unit.state().items() if name in known}
        if self.store is not None:
            laid = self.store.whole(lambda piece: piece.parameter.detach())
            own |= {name: value for name, value in laid.items() if name in own}
        return {name: whole(value) for name, value in own.items()}

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Copy ``value`` into the whole parameter or buffer ``name``, as far as it is here."""
        if self.store is not None and self.store.has(name):
            self.store.put(name, value)
            return
        for unit in self.units():  # copies of a buffer may be in several
            if name.startswith(unit.prefix) and (own := unit.state().get(name)) is not None:
                local(own).copy_(part_of(own, value))

    def distinct(self) -> list[nn.Parameter]:
        """The parameters, each once."""
        return list({id(p): p for p in self.parameters.values()}.values())

    def counted(self) -> dict[str, nn.Parameter]:
        """The parameters that this process answers for in a sum over the model: a tied one on its owner, under its
        first name.
        """
        first = {id(p): name for name, p in reversed(self.parameters.items())}
        for tie in self.blueprint.ties:
            name = "" if self.rank is None else tie.names.get(self.rank, "")
            if self.rank != min(tie.names) and name in self.parameters:  # a small one is in another replica's shard
                del first[id(self.parameters[name])]
        own = {name: self.parameters[name] for name in first.values()}
        return {name: p for name, p in own.items() if self.division is None or self.division.counts(name)}

    def modules(self) -> list[nn.Module]:
        """The modules of this process's stages, and the root."""
        return [self.blueprint.root, *(module for unit in self.units() for module in unit.train.modules())]

    def buffers(self) -> list[tuple[Tensor, Tensor]]:
        """The buffers of :meth:`modules`, each with a copy of what it is now."""
        return [(b, b.clone()) for module in self.modules() for b in module.buffers(recurse=False)]

    @contextmanager
    def given(self) -> Iterator[None]:
        """In here the model's parameters have the dtypes in which the user gave them, and no values."""
        dtypes = self.blueprint.given
        named = {p: dtypes[name] for unit in self.blueprint.units for name, p in unit.named_parameters()}
        changed = [(p, p.data) for p, dtype in named.items() if p.dtype is not dtype]
        for p, data in changed:
            p.data = torch.empty((), dtype=named[p], device=p.device).expand(data.shape)
        try:
            yield
        finally:
            for p, data in changed:
                p.data = data

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without gradients, this process's modules in evaluation mode and with what the optimizer's parameters are;
        then modes and random numbers are as they were. Collective over replicas.
        """
        modes = [(module, module.training) for module in self.modules()]
        for module, _ in modes:
            module.training = False
        try:
            with torch.no_grad(), preserved(self.devices), self.ready():
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Steps in here start without gradients; then gradients and buffers are as they were."""
        gradients = Deltas(self.parameters.values())
        buffers = self.buffers()
        try:
            yield
        finally:
            gradients.drop()
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    @contextmanager
    def replaced(self, stages: Mapping[int, Stage]) -> Iterator[None]:
        """Steps in here run ``stages`` in place of this process's own."""
        for index, runner in self._runners.items():
            runner.stage, runner.store = stages[index], None
        try:
            with self.ready():
                yield
        finally:
            for index, runner in self._runners.items():
                runner.stage, runner.store = self.stages[index], self.store

    def ready(self) -> AbstractContextManager[None]:
        """In here the stages compute with what the optimizer's parameters are; collective over replicas."""
        return nullcontext() if self.store is None else self.store.ready()

    def peaks(self) -> list[float]:
        """The most activations that each rank of this process held in the last step, as simulations count them."""
        chunks = self.blueprint.schedule.chunks
        return [held.peak / chunks for _, held in sorted(self._held.items())]

    def refuse_held(self) -> None:
        """Raise ``TransportError`` where something still holds a received tensor: the link and the tensor's shape."""
        held = [f"{link} {list(shape)}" for link, end in self.receivers.items() for shape in end.held()]
        if held:
            raise TransportError(
                f"something holds received tensors past their last use: {', '.join(held)}; a stage that keeps its "
                "input or output must keep a copy (.detach().clone())"
            )

    def clear(self) -> None:
        """Forget what an exception left half done, in one process."""
        self.outgoing.clear()
        self.generator.clear()
        self._verdict = None
        if self.store is not None:
            self.store.clear()
        for runner in self._runners.values():
            runner.clear()


def build_units(
    blueprint: Blueprint, here: Sequence[int], devices: Sequence[torch.device], kept: Mapping[int, Unit]
) -> dict[int, list[Unit]]:
    """The units of the stages ``here``, with memory and weights, each on the device of its rank; ``devices`` is by
    rank. ``kept`` are there already, by index.
    """
    built: dict[int, list[Unit]] = {}
    for stage in here:
        numbered = enumerate(blueprint.stages[stage], blueprint.first_unit[stage])
        built[stage] = [kept.get(index) or unit.built() for index, unit in numbered]
    for index, units in built.items():
        for unit in units:
            unit.train.to(devices[blueprint.schedule.stage_rank[index]])
            unit.evaluate.to(devices[blueprint.schedule.stage_rank[index]])
    return built


def build_stages(
    blueprint: Blueprint,
    built: Mapping[int, list[Unit]],
    devices: Sequence[torch.device],
    options: Options,
    replica: int = 0,
) -> dict[int, Stage]:
    """The stages of the units ``built``; ``devices`` is by rank."""
    stages = {}
    m = blueprint.schedule.microbatches
    microbatches = range(replica * m, replica * m + m)
    hosts: dict[int, Host] = {}
    for index, units in built.items():
        rank = blueprint.schedule.stage_rank[index]
        device = devices[rank]
        first = blueprint.first_unit[index]
        keys = unit_keys(options.seed, microbatches, range(first, first + len(units)))
        away = [trip.microbatch for trip in blueprint.offload.trips[rank] if trip.stage == index]
        if away and rank not in hosts:
            hosts[rank] = Host(device, options.offload_folder)
        last = index == blueprint.schedule.stages - 1
        stages[index] = Stage(
            index,
            blueprint.root,
            units,
            device,
            keys,
            first,
            blueprint.schedule.defers,
            blueprint.recompute[index],
            choose_head(units, options.loss_fn, options.fuse_loss)[0] if last else None,
            blueprint.precision,
            Offload(away, device, hosts[rank]) if away else None,
        )
    return stages
