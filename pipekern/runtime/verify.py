"""The unsplit model run beside the pipeline, and how far apart the two are."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pipekern.errors import ConfigError
from pipekern.parallel.tensor import whole
from pipekern.runtime import microbatch
from pipekern.runtime.loss import Loss
from pipekern.runtime.pipeline import Pipeline
from pipekern.stage.random import generator, mix, preserved, step_key, unit_keys
from pipekern.stage.skip import Skip
from pipekern.stage.stage import cast
from pipekern.stage.unit import Unit


@dataclass(frozen=True)
class Verification:
    """How far a pipeline is from the unsplit model on one batch.

    ``errors[name]`` is the largest difference of an entry of that parameter's gradient, divided by the largest entry of
    any gradient of the unsplit model; ``max_error`` the largest of them, at ``worst``; ``loss_error`` the difference of
    the losses divided by the unsplit model's.
    """

    loss: float
    loss_error: float
    errors: dict[str, float]

    @property
    def worst(self) -> str:
        return max(self.errors, key=lambda name: self.errors[name], default="")

    @property
    def max_error(self) -> float:
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        return (
            f"largest gradient error {self.max_error:.1e} (at {self.worst}, of {len(self.errors)} parameters), "
            f"loss error {self.loss_error:.1e}"
        )


def verify(pipe: Pipeline, x: Any, y: Any) -> Verification:
    """Run one ``train_step`` and the unsplit model on the same batch, weights and random numbers, and compare;
    collective.

    Every rank gives the whole batch and gets the same answer. The rank of the last stage holds the whole model
    meanwhile. Gradients, buffers, random state and the step count are left as they were. Under ``precision`` the
    unsplit model computes in it, too. Raises ``ConfigError`` where a mesh has several replicas. Random numbers are
    those of the unsplit model only where no tensor-parallel part draws its own.
    """
    star = pipe._parts.star
    if pipe._parts.sizes.dp > 1:
        raise ConfigError(
            f"verify of a mesh of {pipe._parts.sizes.dp} replicas: it compares one pipeline with one model; verify the "
            "model without dp"
        )
    state = _merged(star.gather(dict(pipe.state_dict())))
    step = pipe._step
    try:
        with pipe._parts.undisturbed():
            loss = pipe.train_step(x, y)
            grads = {n: None if p.grad is None else whole(p.grad) for n, p in pipe.named_parameters()}
            grads = _merged(star.gather(grads))
    finally:
        pipe._step = step
    if star.alone or star.rank == star.root:
        found = _compare(pipe, state, x, y, float(loss), grads)
    else:
        found = {}
    answers = star.gather(found)
    return Verification(**next(answer for answer in answers if answer))


def _merged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for row in rows for name, value in row.items()}


def _compare(
    pipe: Pipeline, state: dict[str, Any], x: Any, y: Any, loss: float, grads: dict[str, Any]
) -> dict[str, Any]:
    model = _unsplit(pipe, state)
    with preserved(pipe._parts.devices):
        wanted_loss = _reference_step(pipe, model, x, y)
    wanted = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}
    largest = max((float(g.abs().max()) for g in wanted.values() if g is not None and g.numel()), default=0.0)
    errors = {name: _difference(grads[name], wanted[name]) / (largest or 1.0) for name in wanted if name in grads}
    return {"loss": wanted_loss, "loss_error": abs(loss - wanted_loss) / (abs(wanted_loss) or 1.0), "errors": errors}


def _difference(got: torch.Tensor | None, want: torch.Tensor | None) -> float:
    if got is None or want is None:
        there = got if want is None else want
        return 0.0 if there is None or there.numel() == 0 else float(there.abs().max())
    difference = (got.to(want.device) - want).abs().double()
    return float(torch.nan_to_num(difference, nan=math.inf).max()) if want.numel() else 0.0


def _unsplit(pipe: Pipeline, state: dict[str, Any]) -> nn.Module:
    """The whole model with the weights ``state``, made from the root, or built from its specs."""
    blueprint = pipe._parts.blueprint
    units = [unit for stage in blueprint.stages for unit in stage]
    device = pipe._parts.devices[-1]
    if units[0].build is not None:
        model: nn.Module = Skip(*(unit.built().train for unit in units))
    else:
        model = copy.deepcopy(blueprint.root)
        if pipe._parts.division is not None:
            pipe._parts.division.leave(model)
        real: dict[nn.Parameter, nn.Parameter] = {}
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None and (p.is_meta or isinstance(p, DTensor)):
                    empty = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device), p.requires_grad)
                    module._parameters[name] = real.setdefault(p, empty)
    model.to(device).load_state_dict(state)
    model.zero_grad()
    low = {} if pipe._parts.store is None else pipe._parts.store.low
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in low:
            parameter.data = parameter.data.to(low[name])
            parameter.grad_dtype = torch.float32
    return model


def _reference_step(pipe: Pipeline, model: nn.Module, x: Any, y: Any) -> float:
    """The loss; gradients are left in ``model``. Micro-batch by micro-batch in order, every unit with the pipeline's
    own keys.
    """
    blueprint, device = pipe._parts.blueprint, pipe._parts.devices[-1]
    m = blueprint.schedule.microbatches
    units = [unit for stage in blueprint.stages for unit in stage]
    keys = unit_keys(pipe._options.seed, range(m), range(len(units)))
    reseed = _Reseed(model, units, device)
    precision = pipe._parts.blueprint.precision
    loss = Loss(pipe._parts.loss.loss_fn, low_precision=precision is not None)
    xs, ys = microbatch.split(x, m, "x"), microbatch.split(y, m, "y")
    loss.start(ys, microbatch.sizes(microbatch.batch_size(x, "x"), m))
    for i in range(m):
        reseed.start([key ^ step_key(pipe._options.seed, pipe._step) for key in keys[i]])
        output = units[0].spreading(model)(cast(microbatch.to_device(xs[i], device), precision))
        value, weight = loss.forward(i, output, microbatch.to_device(ys[i], device))
        torch.autograd.backward(value, torch.full_like(value, weight))
    verdict = loss.result()
    if verdict.divisor is not None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= verdict.divisor
    return float(verdict.loss)  # type: ignore[arg-type]


class _Reseed:
    """Seeds the generator where each unit of an unsplit model begins."""

    def __init__(self, model: nn.Module, units: list[Unit], device: torch.device):
        self._generator = generator(device)
        self._skeleton = units[0].skeleton
        if self._skeleton is not None:
            for path, unit in self._skeleton.unit.items():
                model.get_submodule(path).register_forward_pre_hook(functools.partial(self._call, unit))
            return
        traced = not units[0].prefix  # only a traced model has code before and after its layers
        self._before = traced and units[0].name == "before"
        after = traced and units[-1].name == "after"
        layers = [unit.name for unit in units[self._before : len(units) - after]]
        for layer in {model.get_submodule(name): None for name in layers}:
            layer.register_forward_pre_hook(lambda *_: self._next())
        if after:
            model.get_submodule(layers[-1]).register_forward_hook(lambda *_: self._last(len(units)))

    def start(self, keys: list[int]) -> None:
        """Begin a micro-batch."""
        self._keys, self._position = keys, 0
        self._calls = [0] * len(keys)
        if self._skeleton is None and self._before:
            self._next()

    def _call(self, unit: int, *_: object) -> None:
        """A unit of a replayed model has a seed a call."""
        self._calls[unit] += 1
        self._generator.manual_seed(mix(self._keys[unit], self._calls[unit]))

    def _next(self) -> None:
        self._generator.manual_seed(self._keys[self._position])
        self._position += 1

    def _last(self, units: int) -> None:
        if self._position == units - 1:
            self._next()
