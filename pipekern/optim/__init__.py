"""What follows a backward: the fused optimizer, the loss scale, one norm over all stages."""

from pipekern.optim.adamw import AdamW
from pipekern.optim.scale import LossScale

__all__ = ["AdamW", "LossScale"]
