"""The twin of every op in plain torch, with the op's signature: what the CPU runs, and what kernels are tested against.

Statistics are float32, or float64 where the input is.
"""

from .activation import gelu, gelu_backward, swiglu, swiglu_backward
from .linear import linear_backward_weight
from .loss import cross_entropy, cross_entropy_backward, cross_entropy_backward_
from .norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward, statistics
from .optimizer import accumulate_, adamw_step, grad_stats
from .pack import pack, unpack
from .rope import rope, rope_

__all__ = [
    "accumulate_",
    "adamw_step",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_backward_",
    "gelu",
    "gelu_backward",
    "grad_stats",
    "layer_norm",
    "layer_norm_backward",
    "linear_backward_weight",
    "pack",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "rope_",
    "statistics",
    "swiglu",
    "swiglu_backward",
    "unpack",
]
