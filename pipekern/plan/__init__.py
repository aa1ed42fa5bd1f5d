"""Plans: how layers are cut into stages."""

from pipekern.plan.partition import Partition, StageMemory, partition, partition_types

__all__ = ["Partition", "StageMemory", "partition", "partition_types"]
