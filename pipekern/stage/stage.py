"""One stage: its units run forward and backward, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pipekern.parallel.tensor import local
from pipekern.stage.chain import Forward, chains
from pipekern.stage.deferral import Deferral
from pipekern.stage.head import Head
from pipekern.stage.offload import Offload
from pipekern.stage.refusal import refusal
from pipekern.stage.unit import Unit
from pipekern.stage.work import Work
from pipekern.transport.message import refuse
from pipekern.transport.value import distinct, map_tensors, tensors

_Root = torch.Tensor | GradientEdge
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ipow")


class Stash(NamedTuple):
    """What a forward leaves for its backward: the leaves it came from, and the outputs a gradient will come for, of
    one that is put away their places in the graph.
    """

    leaves: list[torch.Tensor]
    outputs: Sequence[_Root]


class Stage:
    """The units of stage ``index`` of the model ``root``, on ``device``; ``first`` is the index of the first of them.

    ``root.training`` chooses the units' training code, as it does for the unsplit model. ``keys[microbatch][i]`` seeds
    unit i (see ``random.py``). Values between stages are those of ``transport/message.py``.
    With ``defers`` weight gradients wait for :meth:`backward_weight` where a layer can put them off. ``recompute[i]``
    says what of unit i is made again in the backward, see ``recompute.py``; by default nothing. A ``head`` is left to
    the loss, which is given its input. ``dtype`` is what stages compute in and the first one makes of a batch's floats.
    ``offload`` says which micro-batches are put away between forward and backward.
    """

    def __init__(
        self,
        index: int,
        root: nn.Module,
        units: Sequence[Unit],
        device: torch.device,
        keys: list[list[int]],
        first: int = 0,
        defers: bool = False,
        recompute: Sequence[str] = (),
        head: Head | None = None,
        dtype: torch.dtype | None = None,
        offload: Offload | None = None,
    ):
        self.index = index
        self._root = root
        self.head = head
        self._precision, self._dtype = dtype, dtype if index == 0 else None
        self.units = list(units)
        self.device = device
        again = recompute or ["none"] * len(units)
        train, evaluate = [unit.train for unit in units], [unit.evaluate for unit in units]
        self._forward, self._evaluate = _ways(units, train, evaluate, first, device, again)
        self._to_loss, self._evaluate_to_loss = self._forward, self._evaluate
        if head is not None:
            train, evaluate = [*train[:-1], head.train], [*evaluate[:-1], head.evaluate]
            self._to_loss, self._evaluate_to_loss = _ways(units, train, evaluate, first, device, again)
        self._keys = keys
        self._stash: dict[int, Stash] = {}
        self._work: dict[int, list[Work]] = {}
        self._modules = [module for unit in units for module in unit.train.modules()]
        self._deferral = Deferral(self._modules) if defers else None
        self._deferring: AbstractContextManager[None] = self._deferral or nullcontext()
        self._fresh: list[nn.Parameter] = []
        self._offload = offload
        self._copies_input = any(_writes_in_place(unit.train) for unit in units)

    def parameters(self) -> list[nn.Parameter]:
        """This stage's parameters, each once, in the model's order."""
        return list({id(p): p for unit in self.units for _, p in unit.named_parameters()}.values())

    @property
    def live(self) -> int:
        """Micro-batches of which it holds something: forward done, weight work not, and not away."""
        return len(self._stash) + len(self._work) - (0 if self._offload is None else len(self._offload.away))

    def begin(self) -> None:
        """Start a step."""
        self._fresh = [p for p in self.parameters() if p.grad is None]

    def forward(
        self, microbatch: int, value: Any, step_key: int, loss: Callable[[Any], torch.Tensor] | None = None
    ) -> Any:
        """Run the units on ``value``, whose leaf tensors get the gradient, with the random numbers of this micro-batch.

        The last stage gives ``loss``, which takes the model's output (its head's input, where it has one) to the
        scalar that the backward starts from.
        """
        leaves = [t for t in _gradient_leaves(value) if t.is_leaf]  # a batch may have a graph of its own before it
        value = cast(value, self._dtype)
        offload, given = self._away(microbatch), tensors(value) if self.index == 0 else []
        if offload is not None:
            value = map_tensors(_seen_from_graph, value)
        if self._copies_input:  # a batch too: micro-batches are views of it, and autograd takes all for written
            value = map_tensors(torch.clone, value)
        try:
            with self._deferring, nullcontext() if offload is None else offload.saving(microbatch):
                keys = [key ^ step_key for key in self._keys[microbatch]]
                run = self._forward if loss is None else self._to_loss
                value = run[self._root.training](keys, value)
                if loss is not None:  # it may go backward on its own through layers that put work off
                    value = loss(value)
        except RuntimeError as error:
            meant = refusal(error, self.index, self._root, self._precision)
            if meant is None:
                raise
            raise meant from error
        # What could not travel is refused here, also where the next stage is on this rank: it may hide tensors.
        outputs = _gradient_leaves(value, refuse)
        if offload is None:
            self._stash[microbatch] = Stash(leaves, outputs)
        else:
            offload.put(microbatch, [*given, *self._state()])
            self._stash[microbatch] = Stash(leaves, [get_gradient_edge(output) for output in outputs])
        return value

    def _state(self) -> list[torch.Tensor]:
        """Parameters and buffers as they are now: what shards them has others in a step than before it."""
        held = (t for m in self._modules for t in (*m._parameters.values(), *m._buffers.values()))
        return [t for t in held if t is not None]

    def _away(self, microbatch: int) -> Offload | None:
        """The offload, if it takes this micro-batch."""
        return self._offload if self._offload is not None and self._offload.takes(microbatch) else None

    def put_away(self, microbatch: int) -> None:
        """AWAY: let go of what the forward has left on the device, which is in host memory by now."""
        assert self._offload is not None
        self._offload.settle(microbatch)
        for leaf in self._stash[microbatch].leaves if self.index > 0 else ():  # a batch is its owner's
            if leaf.is_contiguous():  # else the layout that its gradient will have would change
                leaf.data = leaf.new_zeros(()).expand(leaf.shape)

    def bring_back(self, microbatch: int) -> None:
        """BACK: begin to bring back what was put away, for the backward."""
        assert self._offload is not None
        self._offload.fetch(microbatch)

    def evaluate(self, value: Any, loss: Callable[[Any], torch.Tensor] | None = None) -> Any:
        """Run the units without random numbers or gradients, and ``loss``; the caller holds ``torch.no_grad()``."""
        value = cast(value, self._dtype)
        try:
            if loss is None:
                return self._evaluate(self._keys[0], value)
            return loss(self._evaluate_to_loss(self._keys[0], value))
        except RuntimeError as error:
            meant = refusal(error, self.index, self._root, self._precision)
            if meant is None:
                raise
            raise meant from error

    def backward(self, microbatch: int, gradients: Any) -> Any:
        """Gradients of the forward's leaves, from those of its outputs; both one tensor, or a list, None where there is
        none.

        Adds the weight gradients to ``.grad``.
        """
        returned = self.backward_input(microbatch, gradients)
        self.backward_weight(microbatch)
        return returned

    def backward_weight(self, microbatch: int) -> None:
        """Add to ``.grad`` what :meth:`backward_input` has put off."""
        for work in self._work.pop(microbatch):
            work()

    def backward_input(self, microbatch: int, gradients: Any) -> Any:
        """As :meth:`backward`, but that weight gradients which can wait are put off."""
        leaves, outputs = self._stash.pop(microbatch)
        if (offload := self._away(microbatch)) is not None:
            offload.join(microbatch)
        with self._deferring:
            if len(outputs) == 1 and isinstance(gradients, torch.Tensor):
                torch.autograd.backward(outputs[0], gradients)
            else:
                _backward_many(outputs, gradients)
        work = self._work[microbatch] = self._deferral.take() if self._deferral is not None else []
        if self._fresh:
            given = gradients if isinstance(gradients, list) else [gradients]
            kept = [tensor for one in work for tensor in one.kept]
            self._fresh = _own_gradients(self._fresh, [*given, *(leaf.grad for leaf in leaves), *kept])
        if len(leaves) == 1:
            return _take_grad(leaves[0])
        return [_take_grad(leaf) for leaf in leaves] or None

    def clear(self) -> None:
        """Forget every micro-batch: what an exception left half done."""
        self._stash.clear()
        self._work.clear()
        if self._deferral is not None:
            self._deferral.take()
        if self._offload is not None:
            self._offload.clear()


def _ways(
    units: Sequence[Unit],
    train: Sequence[nn.Module],
    evaluate: Sequence[nn.Module],
    first: int,
    device: torch.device,
    recompute: Sequence[str],
) -> tuple[dict[bool, Forward], Forward]:
    """The forwards of a step, by ``root.training``, and that of an evaluation."""
    ways = (train, recompute), (evaluate, recompute), (evaluate, None)
    in_training, in_evaluation, alone = chains(units, first, device, *ways)
    return {True: in_training, False: in_evaluation}, alone


def _own_gradients(fresh: Sequence[nn.Parameter], used: Sequence[torch.Tensor | None]) -> list[nn.Parameter]:
    """Give each parameter that has just got its first gradient memory of its own; returns those still without one.

    Autograd may keep a view of the gradient that came in as a parameter's ``.grad`` (a bias behind a reshape). That
    memory is a slot, or on its way to another stage, or another parameter's gradient, or what weight work waits for:
    later sums into it would corrupt what is there, without an error.
    """
    memory = {t.untyped_storage().data_ptr() for t in used if t is not None}
    for parameter in fresh:
        grad = parameter.grad
        if grad is None or grad.layout != torch.strided:
            continue
        if local(grad).untyped_storage().data_ptr() in memory:
            grad = parameter.grad = grad.clone()
        memory.add(local(grad).untyped_storage().data_ptr())
    return [p for p in fresh if p.grad is None]


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """``value`` with its floats in ``dtype``; as it is for None."""
    return value if dtype is None else map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, value)


def detached(value: Any) -> Any:
    """The same tensors as leaves of a new graph, each requiring a gradient if it did: what a stage on the same rank
    gets.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    return map_tensors(detached, value)


def _gradient_leaves(value: Any, other: Callable[[Any], object] | None = None) -> list[torch.Tensor]:
    """The tensors that a gradient goes through, each once, in the same order on both sides of a cut."""
    if isinstance(value, torch.Tensor):
        return [value] if value.requires_grad else []
    return [t for t in distinct(tensors(value, other)) if t.requires_grad]


def _seen_from_graph(tensor: torch.Tensor) -> torch.Tensor:
    """A view where ``tensor`` is a leaf, so that a graph which holds the leaf need not hold its memory."""
    return tensor.view_as(tensor) if tensor.requires_grad and tensor.is_leaf else tensor


def _take_grad(leaf: torch.Tensor) -> torch.Tensor | None:
    grad, leaf.grad = leaf.grad, None
    return grad


def _backward_many(outputs: Sequence[_Root], gradients: Any) -> None:
    given = gradients if isinstance(gradients, list) else [gradients] * len(outputs)
    pairs = [(output, grad) for output, grad in zip(outputs, given, strict=True) if grad is not None]
    if pairs:
        roots: Any = [output for output, _ in pairs]
        torch.autograd.backward(roots, [grad for _, grad in pairs])


def _writes_in_place(module: nn.Module) -> bool:
    """Whether it may write into its input, which autograd forbids on a leaf: then the stage works on a copy."""
    if any(getattr(m, "inplace", False) for m in module.modules()):
        return True
    if isinstance(module, torch.fx.GraphModule):
        return any(
            (node.op == "call_function" and getattr(node.target, "__name__", "") in _IN_PLACE)
            or (node.op == "call_method" and str(node.target).endswith("_"))
            or node.kwargs.get("inplace", False)
            for node in module.graph.nodes
        )
    return False
