"""The modules of a process's units in tensor-parallel parts, as styles of torch say, and what must hold around them.

* **Values.** What enters and leaves such a module is there when it does: torch hands on results of collectives under
  way, which no link takes.
* **Random numbers.** After a module whose output is in parts each part draws its own, until one whose output is whole:
  dropout on shards then differs between the parts. All else draws the same on all of them, as the unsplit model does.
* **Gradients.** A whole parameter that is used on shards (a norm of each head) has a part of its gradient on each part.
  Which ones these are is read from autograd's graph, at a module's first forward.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from pipekern.errors import ConfigError
from pipekern.parallel.tensor import Parts, in_shards, settled
from pipekern.stage.random import generator, mix
from pipekern.stage.unit import Unit
from pipekern.transport.value import map_tensors, tensors

Styles = Mapping[str, ParallelStyle]
Holders = list[tuple[nn.Parameter, list[tuple[str, nn.Module, str]]]]  # of each: its names, modules, names there


def named_modules(units: Iterable[Unit]) -> list[tuple[str, nn.Module]]:
    """The modules of ``units``, each once, with their names in the whole model."""
    tops = [(unit.prefix, top) for unit in units for top in (unit.train, unit.evaluate)]
    found = [((prefix + path).rstrip("."), module) for prefix, top in tops for path, module in top.named_modules()]
    return list({id(module): (name, module) for name, module in reversed(found)}.values())[::-1]


class Division:
    """Divides the modules of ``units`` that ``styles`` name among ``parts``; ``device`` is where they are. Collective:
    all parts take the values of the first. ``others``: further modules of the model, in which a divided weight that
    they have, too, is replaced.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        styles: Styles,
        parts: Parts,
        device: torch.device,
        others: Iterable[nn.Module] = (),
    ):
        self.parts = parts
        self._partial: set[int] = set()
        self._compared = False
        self._hooks: dict[str, list[int]] = {}  # keys of the hooks of divided modules
        for tensor in {id(t): t for unit in units for t in unit.state().values()}.values():
            parts.equalise(tensor.detach())
        modules = named_modules(units)
        holders = _holders(modules)
        numbers = _Numbers(generator(device), parts.index)
        for name, module in modules:
            if name in styles:
                self._hooks[name] = _divide(name, module, styles[name], parts, numbers)
            elif any(p.requires_grad for p in module.parameters(recurse=False)):
                self._watch(module)
        _tie_again(holders)
        replaced = {id(old): (old, module._parameters[own]) for old, ((_, module, own), *_) in holders}
        for module in others:
            for own, old in module._parameters.items():
                if id(old) in replaced:
                    module._parameters[own] = replaced[id(old)][1]
        self._named = {name: p for unit in units for name, p in unit.named_parameters()}

    def _watch(self, module: nn.Module) -> None:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            if torch.is_grad_enabled() and module.training:
                handle.remove()
                if _comes_in_shards(tensors((args, kwargs))):
                    self._partial.update(id(p) for p in module.parameters(recurse=False))

        handle = module.register_forward_pre_hook(look, with_kwargs=True)

    def leave(self, model: nn.Module) -> None:
        """Take what divides modules off a copy of the whole model, but for its parameters."""
        for name, keys in self._hooks.items():
            module = model.get_submodule(name)
            for key in keys:
                for hooks in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks):
                    hooks.pop(key, None)

    def layouts(self) -> dict[str, str]:
        """How each parameter lies on the parts, by its name in the model."""
        return {name: str(p.placements) if isinstance(p, DTensor) else "whole" for name, p in self._named.items()}

    def counts(self, name: str) -> bool:
        """Whether a sum over the model counts what this part has of a parameter; what is whole, the first does."""
        return self.parts.index == 0 or in_shards(self._named[name])

    def finish(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """At the end of a step: make each ``.grad`` of it, so far a sum over micro-batches, one over the parts where it
        is in parts. Collective. Raises ``ConfigError``, in the first step, for one that should be alike on all of them.
        """
        own = {id(p): (name, p) for name, p in parameters.items() if p.grad is not None}
        partial: dict[torch.dtype, list[Tensor]] = {}
        alike = True
        for name, p in own.values():
            assert p.grad is not None
            whole = self._named[name]
            if isinstance(p, DTensor) and isinstance(p.grad, DTensor):
                if p.grad.placements != p.placements:
                    p.grad = p.grad.redistribute(placements=p.placements)
            elif isinstance(whole, DTensor):
                continue  # a shard between replicas, which was a sum when they began to sum it
            elif id(whole) in self._partial:
                partial.setdefault(p.grad.dtype, []).append(p.grad)
            elif not self._compared and p.grad.layout is torch.strided:
                alike = self._alike(name, p.grad) and alike
        for grads in partial.values():
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            self.parts.sum(flat).wait()
            for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(total.view_as(grad))
        self._compared |= alike

    def _alike(self, name: str, grad: Tensor) -> bool:
        """Refuse a gradient that other parts have otherwise; 1 %: atomic sums on a GPU round from run to run. False
        where it is not finite: nothing is known.
        """
        rows = grad.new_empty(self.parts.size, grad.numel())
        rows[self.parts.index] = grad.reshape(-1)
        self.parts.gather(rows.view(-1)).wait()
        if not bool(rows.isfinite().all()):
            return False
        if bool(((rows - rows[0]).norm(dim=1) > 0.01 * rows[0].norm()).any()):
            raise ConfigError(
                f"the gradient of {name} differs between the tensor-parallel parts: it is whole, and used on what "
                "is in parts by code that is no module of its own; move that into a module, or put it into the plan"
            )
        return True


def _holders(modules: Iterable[tuple[str, nn.Module]]) -> Holders:
    holders: dict[int, tuple[nn.Parameter, list[tuple[str, nn.Module, str]]]] = {}
    for name, module in modules:
        for own, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), (parameter, []))[1].append((f"{name}.{own}", module, own))
    return list(holders.values())


def _tie_again(holders: Holders) -> None:
    """What was one parameter is one again; ``ConfigError`` where the plan divides it in several ways."""
    for _, places in holders:
        found = [module._parameters[own] for _, module, own in places]
        layouts = {p.placements if isinstance(p, DTensor) else None for p in found}
        if len(layouts) > 1:
            names = " and ".join(name for name, *_ in places)
            raise ConfigError(
                f"tensor_parallel: {names} are one weight, which the plan divides in several ways "
                f"({', '.join(map(str, layouts))}); divide an embedding by rows and a head by columns, or neither"
            )
        for _, module, own in places:
            module._parameters[own] = found[0]


def _divide(name: str, module: nn.Module, style: ParallelStyle, parts: Parts, numbers: _Numbers) -> list[int]:
    """Divide one module; returns the keys of its new hooks."""
    there = {*module._forward_pre_hooks, *module._forward_hooks}
    seed = zlib.crc32(name.encode())

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module.training and whole_input:
            numbers.share()
        return map_tensors(_here, args), map_tensors(_here, kwargs)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if module.training and whole_output is not None:
            if whole_output:
                numbers.share()
            else:
                numbers.part(seed)
        return map_tensors(lambda value: _here(value, whole_output is False), output)

    module.register_forward_pre_hook(before, with_kwargs=True)  # before torch's, and after them
    try:
        parallelize_module(module, parts.mesh, style, src_data_rank=None)
    except NotImplementedError as error:
        raise ConfigError(f"tensor_parallel: {name} is a {type(module).__name__}: {error}") from error
    whole_input, whole_output = _wholeness(style)  # torch's styles know their input only now
    module.register_forward_hook(after)
    return [key for key in (*module._forward_pre_hooks, *module._forward_hooks) if key not in there]


def _wholeness(style: Any) -> tuple[bool, bool | None]:
    """Whether what a module of this ``style`` works on is whole, and what it returns; None: the style says nothing."""
    inputs = getattr(style, "desired_input_layouts", None) or ()
    output = getattr(style, "desired_output_layouts", None) or getattr(style, "output_layouts", None)
    output = output or getattr(style, "sequence_sharding", None)
    every = [placement for placement in inputs if placement is not None]
    return (
        bool(every) and all(placement.is_replicate() for placement in every),
        None if output is None else all(p is None or p.is_replicate() for p in output),
    )


class _Numbers:
    """Random numbers that this part draws, from ``generator``: those of all parts, or its own."""

    def __init__(self, generator: torch.Generator, index: int):
        self._generator, self._index = generator, index
        self._own, self._shared = -1, generator.get_state()

    @property
    def _apart(self) -> bool:
        return self._generator.initial_seed() == self._own  # else a unit has begun, with a seed of its own

    def part(self, key: int) -> None:
        """From here on this part's own, by ``key`` and the seed of the unit."""
        if not self._apart:
            self._shared = self._generator.get_state()
            self._own = mix(self._generator.initial_seed(), key, self._index)
            self._generator.manual_seed(self._own)

    def share(self) -> None:
        """Go on with the numbers of all parts."""
        if self._apart:
            self._generator.set_state(self._shared)


class _Here(torch.autograd.Function):
    """The value, and its gradient, when the collectives that make them have ended. The node says what the value is."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shards: bool | None) -> Tensor:
        ctx.shards = shards
        value = settled(value)
        with torch._C._AutoDispatchBelowADInplaceOrView():  # as a view, it could not be written in place
            return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return settled(gradient), None


def _here(value: Tensor, shards: bool | None = None) -> Tensor:
    if isinstance(value, DTensor):
        return value
    return _Here.apply(value, shards) if value.requires_grad else settled(value)


def _comes_in_shards(values: Iterable[Tensor]) -> bool:
    """Whether any of ``values`` was made of a divided module's output in shards, and not made whole since."""
    return any(node.shards for node in _nodes(values))


def _nodes(values: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of ``_Here`` that the graphs of ``values`` come to first, of outputs of divided modules."""
    left: list[Any] = [value.grad_fn for value in values]
    seen: set[Any] = set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "shards", None) is not None:
            yield node
        else:
            left.extend(following for following, _ in node.next_functions)
