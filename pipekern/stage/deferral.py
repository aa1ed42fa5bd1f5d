"""Weight gradients put off: a layer's backward returns the gradient of its input, and W does the rest later.

Here is which layers of a stage do so; ``waiting.py`` has what each kind does. No graph is walked, so that views,
weights used twice and checkpointed regions need nothing of their own. All else has its whole backward in B.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipekern.stage.waiting import FUNCTIONS, LAYERS
from pipekern.stage.work import Put, Work


class Deferral:
    """The layers among ``modules`` that put weight work off, while this context is entered.

    It is to be entered for forwards and for backwards (a checkpointed region runs its forward again in there).
    :meth:`take` gives the work that backwards have left since it was last called.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self._work: list[Work] = []
        self._forwards = [(m, type(m), _forward_of(m, self._work.append)) for m in deferrable(modules)]

    def __enter__(self) -> None:
        for module, kind, forward in self._forwards:
            if type(module) is kind:  # else it has another forward by now
                module.__dict__.setdefault("forward", forward)

    def __exit__(self, *exception: object) -> None:
        for module, _, forward in self._forwards:
            if module.__dict__.get("forward") is forward:
                del module.__dict__["forward"]

    def take(self) -> list[Work]:
        """The weight work of the backwards since the last call; each piece adds to ``.grad`` when it is called."""
        work = self._work[:]
        self._work.clear()
        return work


def deferrable(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Layers of the known kinds, each once, outside of compiled regions, whose forward nobody has replaced."""
    modules = list(modules)
    compiled = {id(inner) for module in modules if _is_compiled(module) for inner in module.modules()}
    known = {id(m): m for m in modules if isinstance(m, tuple(LAYERS)) and id(m) not in compiled}
    yield from (m for m in known.values() if "forward" not in m.__dict__ and not isinstance(m, torch.jit.ScriptModule))


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _forward_of(module: nn.Module, put: Put) -> Callable[..., Tensor]:
    """What stands in for the module's forward."""
    kind = next(kind for kind in LAYERS if isinstance(module, kind))
    if type(module).forward is kind.forward or getattr(module, "stands_for", None) is kind:
        return functools.partial(LAYERS[kind], module, put)
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Calls(module, put):
            return original(*args, **kwargs)

    return forward


class _Calls(TorchFunctionMode):
    """Inside a subclass's own forward: the product with the module's weight is the one that is put off."""

    def __init__(self, module: nn.Module, put: Put):
        super().__init__()
        self._weight, self._put = module._parameters.get("weight"), put
        self._hooks = _saved_tensor_hooks()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of_module = FUNCTIONS.get(func)
        if of_module is not None and len(args) > 1 and args[1] is self._weight and self._hooks == _saved_tensor_hooks():
            return of_module(self._put, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _saved_tensor_hooks() -> Any:
    """Those in force. A region that the forward itself checkpoints has others, and runs again without this mode."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)
