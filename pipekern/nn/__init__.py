"""Modules with pipekern's kernels: constructors and names in the ``state_dict`` are those of torch's own."""

from pipekern.nn.cross_entropy import CrossEntropyLoss
from pipekern.nn.fuse import fuse
from pipekern.nn.fused import Fused, Left, Replaced
from pipekern.nn.gelu import GELU
from pipekern.nn.layer_norm import LayerNorm
from pipekern.nn.linear import Linear
from pipekern.nn.linear_cross_entropy import LinearCrossEntropyLoss
from pipekern.nn.rms_norm import RMSNorm
from pipekern.nn.rotary import RotaryEmbedding
from pipekern.nn.swiglu import SwiGLU

__all__ = [
    "GELU",
    "CrossEntropyLoss",
    "Fused",
    "LayerNorm",
    "Left",
    "Linear",
    "LinearCrossEntropyLoss",
    "RMSNorm",
    "Replaced",
    "RotaryEmbedding",
    "SwiGLU",
    "fuse",
]
