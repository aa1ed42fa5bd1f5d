"""Values that are not finite: seen once a step, and found by running the step again with every stage looking."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipekern.errors import NumericsError
from pipekern.optim.scale import LossScale
from pipekern.parallel.tensor import local
from pipekern.runtime.assembly import Assembly
from pipekern.runtime.batch import Batch
from pipekern.runtime.watch import Watch
from pipekern.stage.random import preserved
from pipekern.stage.stage import Stage, detached
from pipekern.transport.value import tensors


def finite(values: Iterable[Tensor]) -> bool:
    """Whether every entry is. Reads memory once and brings back one number a device and dtype.

    A norm is not finite where an entry is not, and where it overflows: then every entry is looked at.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for value in map(local, values):
        dense = value._values() if value.is_sparse else value
        groups.setdefault((dense.device, dense.dtype), []).append(dense.detach())
    norms = [torch.stack(torch._foreach_norm(group, 2)).sum() for group in groups.values()]
    return all(
        bool(norm.isfinite()) or all(bool(value.isfinite().all()) for value in group)
        for norm, group in zip(norms, groups.values(), strict=True)
    )


class Judgement(NamedTuple):
    """``overflow``: only a lower loss scale is needed. ``trouble``: else what is not finite, and where it arose.
    ``idle``: all is finite, and some process has parameters that it has not used.
    """

    overflow: bool
    trouble: str
    idle: bool = False


class Guard:
    """What is done about a step that is not finite: ``policy`` is ``on_nonfinite`` of ``Pipeline``. With a ``scale`` of
    the loss, such a step is dropped and the scale lowered, until it is at its least. ``watch`` is told of every step.
    """

    def __init__(self, parts: Assembly, watch: Watch, policy: str, scale: LossScale | None = None):
        self._parts, self._watch, self._policy, self._scale = parts, watch, policy, scale

    @property
    def leaves_out(self) -> bool:
        """Whether a step may be left out, for a policy or an overflow."""
        return self.drops or self._scale is not None

    @property
    def drops(self) -> bool:
        """Whether such a step's gradients are dropped."""
        return self._policy == "skip"

    def judge(self, batch: Batch, loss: Tensor) -> Judgement:
        """Whether all ranks' part of the step that has just run is finite; collective."""
        self._watch.note(batch)
        if self._policy == "ignore" and self._scale is None:
            return Judgement(False, "")
        signs = self._signs(loss)
        bad = "0" in signs
        if self._scale is not None:
            value, helpless = self._scale.value, self._scale.update(bad)
            if bad and not helpless:
                text = "step %d overflows at a loss scale of %g: it is left out, the scale is now %g"
                logging.getLogger("pipekern").info(text, batch.step, value, self._scale.value)
                return Judgement(True, "")
        if not bad or self._policy == "ignore":
            return Judgement(False, "", not bad and "2" in signs)
        return Judgement(False, f"step {batch.step} is not finite (loss {float(loss):g}), {locate(self._parts, batch)}")

    def _signs(self, loss: Tensor) -> set[str]:
        """What processes say of their part: 0 not finite, 1 finite, 2 finite with parameters that were not used."""
        parts = self._parts
        sound = finite([loss, *(p.grad for p in parts.parameters.values() if p.grad is not None)])
        sign = "0" if not sound else "2" if parts.store is not None and parts.store.idle else "1"
        told = [text for rows in parts.star.everywhere(sign + self._watch.tell()) for text in rows]
        self._watch.hear(told)
        return {text[0] for text in told}

    def report(self, trouble: str) -> None:
        """Raise ``NumericsError``, or say what was dropped."""
        if self._policy == "raise":
            raise NumericsError(f"{trouble}; look at that data, lower the learning rate, or set on_nonfinite='skip'")
        if self._policy == "skip":
            logging.getLogger("pipekern").warning("%s; the gradients are dropped", trouble)


class Finding(NamedTuple):
    """A place at which something is not finite: ``position`` is the stage, below 0 in a backward."""

    backward: bool
    microbatch: int
    position: int
    what: str


def _place(finding: Finding) -> tuple[bool, int, int]:
    """By the unsplit model's order, whose least is where it arose: forwards before backwards, then micro-batches, then
    stages, for a backward from the last.
    """
    return finding[:3]


def locate(parts: Assembly, batch: Batch) -> str:
    """Where the step on ``batch`` that has just run first made what is not finite; collective.

    The step runs again with the same random numbers, every stage looking at what it makes; gradients, buffers and
    clocks stay as they are. An infinity in a tensor without gradient is passed over: it may be a mask.
    """
    found: list[Finding] = []
    schedule, times, inputs = parts.blueprint.schedule, parts.train.times, batch.inputs
    if inputs is not None:  # a batch may have a graph of its own, which the first run has used up
        inputs = [detached(inputs[i]) for i in range(schedule.microbatches)]
    again = replace(batch, inputs=inputs)
    parts.loss.start(again.targets or [], again.sizes, parts.loss.scale, parts.over_replicas)
    watched = {i: _Watched(stage, schedule.stage_rank[i], again, found.append) for i, stage in parts.stages.items()}
    with parts.undisturbed(), preserved(parts.devices):
        with parts.replaced(watched):
            parts.train.run(again)
        parts.verdict(again)
    parts.train.times = times
    rows = parts.star.everywhere([tuple(one) for one in sorted(found, key=_place)[:1]])
    every = [Finding(*row) for pipeline in rows for own in pipeline for row in own]
    # Of a stage's parts or replicas, the one that knows why has more to say.
    first = min(every, key=lambda finding: (_place(finding), -len(finding.what)), default=None)
    if first is None:
        return (
            "which does not show when the step runs again: a sum over micro-batches or steps overflows, nothing was "
            "counted, or results differ from run to run"
        )
    return f"first at micro-batch {first.microbatch}: {first.what}"


class _Watched(Stage):
    """A second view of ``stage``, whose state it shares, that notes what is not finite and keeps no gradient."""

    def __init__(self, stage: Stage, rank: int, batch: Batch, note: Callable[[Finding], object]):
        vars(self).update(vars(stage))
        self._batch, self._note = batch, note
        self._place = f"stage {self.index} (rank {rank})"

    def forward(self, microbatch: int, value: Any, step_key: int, loss: Callable[[Any], Tensor] | None = None) -> Any:
        output = super().forward(microbatch, value, step_key, loss)
        if not _sound(output):
            what = f"the {'output' if loss is None else 'loss'} of {self._place} is not finite"
            self._note(Finding(False, microbatch, self.index, what + self._cause(microbatch, loss is not None)))
        return output

    def _cause(self, microbatch: int, scores: bool) -> str:
        """What was there before the stage ran, where it explains the rest."""
        x = self._batch.inputs if self.index == 0 else None
        for name, values in (("x", x), ("y", self._batch.targets if scores else None)):
            if values is not None and not finite(_floating(values[microbatch])):
                return f", for {name} is not"
        bad = self._bad_parameter(lambda parameter: parameter)
        return f", for the parameter {bad} is not" if bad else ""

    def _bad_parameter(self, of: Callable[[torch.nn.Parameter], Tensor | None]) -> str:
        for unit in self.units:
            for name, parameter in unit.named_parameters():
                if (value := of(parameter)) is not None and not finite([value]):
                    return name
        return ""

    def backward_input(self, microbatch: int, gradients: Any) -> Any:
        returned = super().backward_input(microbatch, gradients)
        given = returned if isinstance(returned, list) else [returned]
        if not finite(gradient for gradient in given if gradient is not None):
            self._note_backward(microbatch, "its input")
        self._look_at_weights(microbatch)
        return returned

    def backward_weight(self, microbatch: int) -> None:
        super().backward_weight(microbatch)
        self._look_at_weights(microbatch)

    def _look_at_weights(self, microbatch: int) -> None:
        bad = self._bad_parameter(lambda parameter: parameter.grad)
        if bad:
            self._note_backward(microbatch, bad)
        for parameter in self.parameters():
            parameter.grad = None  # so that the next micro-batch is seen alone

    def _note_backward(self, microbatch: int, of: str) -> None:
        what = f"the gradient of {of} at {self._place} is not finite, all forwards are"
        self._note(Finding(True, microbatch, -self.index, what + self._cause(microbatch, scores=False)))


def _floating(value: Any) -> Sequence[Tensor]:
    return [t for t in tensors(value) if t.is_floating_point() or t.is_complex()]


def _sound(value: Any) -> bool:
    held = _floating(value)
    return finite(t for t in held if t.requires_grad) and not any(bool(t.isnan().any()) for t in held)
