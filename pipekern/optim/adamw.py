"""AdamW with one pass over memory: unscale, clip, step, low-precision copies, and gradients zeroed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from pipekern.errors import ConfigError
from pipekern.kernels.adamw_step import adamw_step, hyper_row
from pipekern.kernels.language import FLOATS
from pipekern.optim.launches import Launches, fresh_moment
from pipekern.transport.value import moved

Share = Callable[[Tensor, list[nn.Parameter]], Tensor]


def _alone(stats: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    return stats


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019), to be used as ``torch.optim.AdamW``; on GPUs over pipekern's kernels.

    Per step one reading of the gradients for their norm, and one pass over parameters, gradients and moments. Moments
    are float32 for parameters of any dtype. Nothing waits for the device, but ``state_dict`` and ``load_state_dict``.

    * A step leaves gradients that are zero, in the same memory, and ``zero_grad`` then has nothing to do. So a
      parameter that a later step does not reach has a gradient of zeros, not None, and decays. Where gradients were
      written since, ``zero_grad`` does what torch's does. Dropped otherwise (``model.zero_grad()``), gradients stay in
      memory until the next step, which must then set up its launches anew.
    * A norm that is not finite skips the step: parameters, moments and numbers of steps stay, gradients are zeroed. The
      decision is made on the device. ``norm`` is that of the last step, over all gradients before clipping, unscaled:
      0-d float32.
    * ``grad_scale``: a tensor with one number, the loss scale by which gradients are divided; None by default.
    * A parameter without a gradient does not advance. Parameters of one launch are alike in device, dtypes and the
      number of steps they have taken.
    * ``state_dict`` has the form of ``torch.optim.AdamW``'s, which loads it, and the other way round. ``max_norm`` and
      ``stochastic_rounding`` are not in it.

    Args:
        params: Parameters, or groups with ``lr``, ``betas``, ``eps`` and ``weight_decay`` of their own; float32,
            bfloat16 or float16, with dense gradients of any of these.
        max_norm: Gradients are multiplied by ``max_norm / (norm + 1e-6)`` where that is below 1, as by
            ``torch.nn.utils.clip_grad_norm_``; one norm over all groups.
        stochastic_rounding: bfloat16 parameters are rounded up or down at random, to the nearer more often, so that
            small steps are not lost without a float32 master; the same from run to run.

    Raises:
        ConfigError: A number out of range, a parameter of another dtype, a sparse gradient; ``amsgrad`` or
            ``maximize`` in a state that is loaded.
    """

    grad_scale: Tensor | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float | None = None,
        stochastic_rounding: bool = False,
    ):
        if max_norm is not None and not max_norm > 0:
            raise ConfigError(f"max_norm is {max_norm}; it must be above 0, or None to leave gradients as they are")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_norm = max_norm
        self.stochastic_rounding = stochastic_rounding
        own = [p for p, _ in self._numbered()]
        if stochastic_rounding and own and all(p.dtype is not torch.bfloat16 for p in own):
            raise ConfigError("stochastic_rounding is for bfloat16 parameters, and none of these is: leave it out")
        self._reset()

    def _reset(self) -> None:
        self._hypers: dict[torch.device, tuple[list[list[float]], Tensor]] = {}
        self._zeroed: dict[Tensor, int] = {}
        self.bind(_alone, {})

    def bind(self, share: Share, copies: Mapping[nn.Parameter, Tensor]) -> None:
        """Clip by a norm over more than these parameters, and write low-precision copies in the same pass.

        Args:
            share: Called once a step with float32 [n, 2] on the device, a row for each parameter that has a gradient
                (Σ value², values that are not finite), and these parameters, in the order of their groups. Returns the
                rows that make the norm, [N, 2], in an order that does not depend on who holds what.
            copies: For some parameters the bfloat16 or float16 tensor that gets their new values, rounded to nearest.
        """
        self._share, self._copies = share, copies
        self._launches: Launches | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` runs forward and backward first, and its result is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self._numbered()
        if self._launches is None or not self._launches.hold(parameters):
            self._launches = Launches(parameters, self.state, self._copies)
        stats = self._share(self._launches.stats(), self._launches.parameters)
        norm, scale = stats[:, 0].sum().sqrt(), self.grad_scale
        self.norm = norm if scale is None else norm / scale.to(norm.device).reshape(())
        for launch in self._launches.launches:
            there = launch.device
            adamw_step(
                launch.table, self._hyper(there), launch.progress, moved(stats, there),
                None if scale is None else moved(scale, there),
                self.stochastic_rounding and launch.dtype is torch.bfloat16, zero_grads=True,
            )  # fmt: skip
        self._zeroed = {grad: grad._version for grad in self._launches.grads if grad is not None}
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing after a step, which has zeroed the gradients; else as torch's."""
        grads = [p.grad for p, _ in self._numbered() if p.grad is not None]
        if any(self._zeroed.get(grad) != grad._version for grad in grads):
            super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
        except ConfigError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """In the form of ``torch.optim.AdamW``; waits for the device, to read how many steps were taken."""
        packed = super().state_dict()
        state = {
            key: {**own, "step": torch.tensor(float(own["step"]))} if "step" in own else own
            for key, own in packed["state"].items()
        }
        return {**packed, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the state of this class or of ``torch.optim.AdamW``, and its groups' numbers; moments stay float32."""
        own: dict[Tensor, dict[str, Any]] = {}
        # The last of the hooks, so that it sees what those of others make of the state.
        hook = self.register_load_state_dict_pre_hook(lambda _, given: own.update(self._taken(given)))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        self.state.update(own)
        self._launches = None

    def _taken(self, given: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """The state out of ``given``, copied; torch would round the moments to their parameter's dtype."""
        taken: dict[Tensor, dict[str, Any]] = {}
        steps: dict[Any, Tensor] = {}
        for group, saved in zip(self.param_groups, given["param_groups"], strict=False):  # torch compares the lengths
            _check({**saved, "params": group["params"]})
            for p, key in zip(group["params"], saved["params"], strict=False):
                if not (entry := given["state"].get(key)):
                    continue
                _check_entry(entry, key, p)
                count = int(entry["step"])
                step = steps.setdefault((p.device, count), torch.tensor(count, dtype=torch.int32, device=p.device))
                moments = {name: fresh_moment(p).copy_(entry[name]) for name in ("exp_avg", "exp_avg_sq")}
                taken[p] = {"step": step, **moments}
        return taken

    def _numbered(self) -> list[tuple[nn.Parameter, int]]:
        return [(p, number) for number, group in enumerate(self.param_groups) for p in group["params"]]

    def _hyper(self, device: torch.device) -> Tensor:
        """float32 [groups, 8] on ``device``; made again where a number has changed since the last step."""
        limit = math.inf if self.max_norm is None else self.max_norm
        rows = [hyper_row(g["lr"], g["betas"], g["eps"], g["weight_decay"], limit) for g in self.param_groups]
        known, tensor = self._hypers.get(device, (None, None))
        if tensor is None or rows != known:
            host = torch.tensor(rows, dtype=torch.float32)
            tensor = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
            self._hypers[device] = rows, tensor
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        """What torch's has, and the numbers that are not in groups; a copy is bound to nothing."""
        return {**super().__getstate__(), "max_norm": self.max_norm, "stochastic_rounding": self.stochastic_rounding}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "max_norm" in state:  # a copy, and no loaded state
            self._reset()


def _check(group: dict[str, Any]) -> None:
    for p in group["params"]:
        if p.dtype not in FLOATS:
            raise ConfigError(
                f"a parameter of shape {tuple(p.shape)} is {p.dtype}; pk.optim.AdamW takes float32, bfloat16 and "
                "float16: use torch.optim.AdamW"
            )
    for name in ("lr", "eps", "weight_decay"):
        if not isinstance(group[name], Real) or not 0 <= float(group[name]) < math.inf:
            raise ConfigError(f"{name} is {group[name]!r}; it must be a finite number, at least 0")
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(isinstance(beta, Real) and 0 <= float(beta) < 1 for beta in betas):
        raise ConfigError(f"betas are {group['betas']!r}; they must be two numbers, at least 0 and below 1")
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ConfigError(f"{name} is on, which pk.optim.AdamW does not know: use torch.optim.AdamW")


def _check_entry(entry: dict[str, Any], key: Any, parameter: Tensor) -> None:
    if {"step", "exp_avg", "exp_avg_sq"} - set(entry):
        raise ConfigError(
            f"the state of parameter {key} has {sorted(entry)}; AdamW's has step, exp_avg and exp_avg_sq: give the "
            "state of an AdamW"
        )
    for name in ("exp_avg", "exp_avg_sq"):
        if entry[name].shape != parameter.shape:
            raise ConfigError(
                f"{name} of parameter {key} has shape {tuple(entry[name].shape)}, and the parameter "
                f"{tuple(parameter.shape)}: give the parameters in the order of the saved ones"
            )
