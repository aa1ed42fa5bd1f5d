"""Modules as others write them: what fuse must know, and what only looks alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

H, FF = 12, 20


class Rms(nn.Module):
    """As in Llama, under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(H))
        self.tiny, self.momentum = 1e-5, 0.1

    def forward(self, states: Tensor) -> Tensor:
        wide = states.float()
        return self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.tiny)).to(states.dtype)


class RmsOfOne(Rms):
    """As in Gemma: the weight is around 0."""

    def forward(self, states: Tensor) -> Tensor:
        wide = states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.tiny)
        return (wide * (1 + self.scale.float())).type_as(states)


class Layer(nn.Module):
    """As in old BERTs; the bias comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.beta, self.gamma = nn.Parameter(torch.rand(H)), nn.Parameter(torch.rand(H))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return self.gamma * (x - mean) / torch.sqrt((x - mean).pow(2).mean(-1, keepdim=True) + self.eps) + self.beta


class Gated(nn.Module):
    """As in Llama: three products."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu, bias: bool = False):
        super().__init__()
        self.wide, self.gates = nn.Linear(H, FF, bias), nn.Linear(H, FF, bias)
        self.narrow = nn.Linear(FF, H, bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.act(self.gates(x)) * self.wide(x))


class Packed(nn.Module):
    """As in Phi: gate and up in one product."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down, self.act = nn.Linear(H, 2 * FF), nn.Linear(FF, H), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(up * self.act(gate))


class GeluByHand(nn.Module):
    """As in BERT."""

    def forward(self, value: Tensor) -> Tensor:
        return value * 0.5 * (1.0 + torch.erf(value / 2**0.5))


KNOWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nn.RMSNorm": (lambda: nn.RMSNorm(H), "RMSNorm"),
    "nn.LayerNorm": (lambda: nn.LayerNorm(H, bias=False), "LayerNorm"),
    "nn.LayerNorm over two": (lambda: nn.LayerNorm((3, H)), "LayerNorm"),
    "nn.GELU": (lambda: nn.GELU("tanh"), "GELU"),
    "RMS": (Rms, "RMSNorm"),
    "RMS, 1 + weight": (RmsOfOne, "RMSNorm"),
    "layer norm": (Layer, "LayerNorm"),
    "gate, up, down": (Gated, "SwiGLU"),
    "gate, up, down with biases": (lambda: Gated(nn.SiLU(), True), "SwiGLU"),
    "gate and up in one": (Packed, "SwiGLU"),
    "GELU by hand": (GeluByHand, "GELU"),
}


class RmsWide(Rms):
    """Its result is float32, whatever comes in."""

    def forward(self, states: Tensor) -> Tensor:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        return self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.tiny))


class Detached(Rms):
    """The same values, another gradient."""

    def forward(self, states: Tensor) -> Tensor:
        return self.scale * (states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.tiny).detach())


class Dropping(Gated):
    """Random in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class TwoInputs(Rms):
    def forward(self, states: Tensor, shift: float = 0.0) -> Tensor:
        return super().forward(states) + shift


def _hooked() -> nn.Module:
    module = Rms()
    module.register_forward_hook(lambda *_: None)
    return module


def _act_hooked() -> nn.Module:
    module = Gated(nn.SiLU())
    module.get_submodule("act").register_forward_hook(lambda *_: None)
    return module


def _own_forward() -> nn.Module:
    module: Any = nn.LayerNorm(H)
    module.forward = lambda x: x
    return module


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {  # and a word of the reason; empty: not like any
    "another dtype": (RmsWide, "another dtype"),
    "another gradient": (Detached, "does not compute"),
    "dropout": (Dropping, "does not compute"),
    "another activation": (lambda: Gated(F.gelu), "does not compute"),
    "hooks": (_hooked, "has hooks"),
    "hooks on the activation": (_act_hooked, "SiLU has hooks"),
    "a forward on the instance": (_own_forward, "replaced on the instance"),
    "groups": (lambda: nn.GroupNorm(1, H), "as LayerNorm"),
    "two inputs": (TwoInputs, ""),
    "statistics": (lambda: nn.BatchNorm1d(H), ""),
    "SiLU": (nn.SiLU, ""),
    "dropout alone": (nn.Dropout, ""),
    "a linear layer": (lambda: nn.Linear(H, H), ""),
    "two linear layers": (lambda: nn.Sequential(nn.Linear(H, FF), nn.ReLU(), nn.Linear(FF, H)), ""),
    "parametrised": (
        lambda: nn.utils.parametrize.register_parametrization(Rms(), "scale", nn.Identity()),
        "",
    ),
}
