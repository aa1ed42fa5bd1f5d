"""Plans: how layers are cut into stages."""

from pipekern.plan.partition import Partition, partition

__all__ = ["Partition", "partition"]
