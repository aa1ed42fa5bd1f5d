"""The parts of a running pipeline, put together from its blueprint: stages on devices, links, executors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from pipekern.errors import TransportError
from pipekern.runtime.batch import Batch
from pipekern.runtime.blueprint import Blueprint
from pipekern.runtime.collective import Star, star_links
from pipekern.runtime.deltas import Deltas, Ties, tie_links
from pipekern.runtime.detours import Detours
from pipekern.runtime.executor import Executor
from pipekern.runtime.generate import Generator
from pipekern.runtime.head_loss import choose_head
from pipekern.runtime.lane import Ends, Lane
from pipekern.runtime.loss import Loss, Verdict
from pipekern.runtime.options import Options
from pipekern.runtime.outgoing import LOSS_TAG, Outgoing
from pipekern.runtime.runner import Held, Runner
from pipekern.stage.random import unit_keys
from pipekern.stage.stage import Stage
from pipekern.stage.unit import Unit
from pipekern.transport.base import Link, Receiver, Sender, Transport

_TRAIN = {
    "RECV_F": "receive_forward", "F": "forward", "SEND_F": "send_forward",
    "RECV_B": "receive_backward", "B": "backward_input", "W": "backward_weight", "BW": "backward",
    "SEND_B": "send_backward",
}  # fmt: skip
_EVALUATE = {"RECV_F": "receive_evaluate", "F": "evaluate", "SEND_F": "send_evaluate"}


def links(blueprint: Blueprint, codecs: Mapping[str, str]) -> list[Link]:
    """Every link of the job, in the same order on every rank: between stages with its of ``codecs``, between holders of
    a weight, and the star.
    """
    home, slots = blueprint.schedule.stage_rank, sorted(blueprint.slots().items())
    names = {f"{a}>{b}": (home[a], home[b], count) for (a, b), count in slots}
    between = [Link(name, *ends, codecs[name]) for name, ends in names.items()]
    return between + tie_links(blueprint.ties) + star_links(blueprint.schedule.ranks, blueprint.root_rank)


class Assembly:
    """The stages of this process and everything that runs them. ``rank`` is None where one process has every rank."""

    def __init__(
        self,
        blueprint: Blueprint,
        rank: int | None,
        stages: Mapping[int, Stage],
        loss_fn: Callable[[Any, Any], Any],
        loss_path: str,
        codecs: Mapping[str, str],
        transport: Transport,
        senders: Mapping[str, Sender],
        receivers: Mapping[str, Receiver],
    ):
        self.blueprint, self.rank, self.stages, self.transport = blueprint, rank, stages, transport
        self.loss_path, self.codecs = loss_path, codecs
        last = stages.get(blueprint.schedule.stages - 1)
        self.loss = Loss(loss_fn, None if last is None else last.head)
        self.senders, self.receivers = senders, receivers
        self.outgoing = Outgoing(transport, self.receivers.values(), alone=rank is None)
        schedule = blueprint.schedule
        self.star = Star(rank, schedule.ranks, blueprint.root_rank, self.outgoing, senders, receivers)
        self.parameters: dict[str, nn.Parameter] = dict(p for unit in self.units() for p in unit.named_parameters())
        self.ties = Ties(rank, blueprint.ties, self.parameters, self.outgoing, senders, receivers)
        self._held = {schedule.stage_rank[index]: Held() for index in stages}
        self._runners = {index: self._runner(stage) for index, stage in stages.items()}
        for a, b in [*pairwise(range(schedule.stages)), *blueprint.direct]:
            if schedule.stage_rank[a] == schedule.stage_rank[b] and a in self._runners:
                one, other = self._runners[a].lane(b), self._runners[b].lane(a)
                one.next, other.previous = other, one
        self.train = Executor(self._runners, blueprint.train, rank, _TRAIN, self.outgoing, self._publish)
        self.evaluate = Executor(self._runners, blueprint.evaluate, rank, _EVALUATE, self.outgoing, self._publish)
        layers = [m for units in blueprint.stages for unit in units for m in unit.evaluate.modules()]
        self.generator = Generator(self._runners, schedule, rank, self.star, self.outgoing, layers, blueprint.root)
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
        )

    def _detours(self, stage: Stage) -> Detours | None:
        direct, index = self.blueprint.direct, stage.index

        def lane(before: int | None, after: int | None) -> Lane:
            return Lane(stage.device, self._ends(before, index, after), self.outgoing)

        arriving = {a: lane(a, None) for a, b in direct if b == index}
        leaving = {b: lane(None, b) for a, b in direct if a == index}
        names = {b: names for (a, b), names in direct.items() if a == index}
        return Detours(arriving, leaving, names) if arriving or leaving else None

    def _publish(self, batch: Batch) -> None:
        self._verdict = self.loss.result()
        self.star.publish(LOSS_TAG | batch.tag, self._verdict.encode())

    def verdict(self, batch: Batch) -> Verdict:
        """The loss of the step that has just run: computed here, or received from the last stage."""
        verdict, self._verdict = self._verdict, None
        return Verdict.decode(self.star.receive(LOSS_TAG | batch.tag)) if verdict is None else verdict

    @property
    def devices(self) -> list[torch.device]:
        """The devices of this process's stages, each once."""
        return list(dict.fromkeys(stage.device for stage in self.stages.values()))

    def units(self) -> list[Unit]:
        """The units of this process's stages, in the model's order."""
        return [unit for stage in self.stages.values() for unit in stage.units]

    def counted(self) -> dict[str, nn.Parameter]:
        """The parameters that this process answers for in a sum over the model: a tied one on its owner, under its
        first name.
        """
        first = {id(p): name for name, p in reversed(self.parameters.items())}
        for tie in self.blueprint.ties if self.rank is not None else ():
            if self.rank in tie.names and self.rank != min(tie.names):
                del first[id(self.parameters[tie.names[self.rank]])]
        return {name: self.parameters[name] for name in first.values()}

    def modules(self) -> list[nn.Module]:
        """The modules of this process's stages, and the root."""
        return [self.blueprint.root, *(module for unit in self.units() for module in unit.train.modules())]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """This process's modules in evaluation mode, then back as they were."""
        modes = [(module, module.training) for module in self.modules()]
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Steps in here start without gradients; then gradients and buffers are as they were."""
        gradients = Deltas(self.parameters.values())
        buffers = [(b, b.clone()) for module in self.modules() for b in module.buffers(recurse=False)]
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
            runner.stage = stages[index]
        try:
            yield
        finally:
            for index, runner in self._runners.items():
                runner.stage = self.stages[index]

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
        for runner in self._runners.values():
            runner.clear()


def build_stages(
    blueprint: Blueprint, here: Sequence[int], devices: Sequence[torch.device], options: Options
) -> dict[int, Stage]:
    """The stages ``here``, with memory and weights, each on the device of its rank; ``devices`` is by rank."""
    stages = {}
    for index in here:
        device = devices[blueprint.schedule.stage_rank[index]]
        units = [unit.built() for unit in blueprint.stages[index]]
        for unit in units:
            unit.train.to(device)
            unit.evaluate.to(device)
        first = blueprint.first_unit[index]
        keys = unit_keys(options.seed, blueprint.schedule.microbatches, range(first, first + len(units)))
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
        )
    return stages
