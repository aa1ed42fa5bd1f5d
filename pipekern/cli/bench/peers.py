"""Functions of other libraries, where they are installed."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "liger": "liger_kernel.transformers.functional",
    "cce": "cut_cross_entropy",
    "apex": "apex.normalization.fused_layer_norm",
    "apex wgrad": "fused_weight_gradient_mlp_cuda",
}


def peer(library: str, function: str) -> Any:
    """``function`` of ``library``, or None where it is not installed, or is another thing of that name."""
    try:
        return getattr(importlib.import_module(_HOMES[library]), function, None)
    except ImportError:
        return None


def there(**found: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: one for name, one in found.items() if one is not None}
