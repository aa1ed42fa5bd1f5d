"""Plans: what layers cost, how they are cut into stages, which schedule, and whether it fits."""

from pipekern.plan.balance import Balance, UnitCosts, UnitMemory, balance, predicted
from pipekern.plan.choose import Choice, choose
from pipekern.plan.cluster import Cluster, Device, Link
from pipekern.plan.codec import choose_codec
from pipekern.plan.cost import Estimated, Layer, Measured, Work, measured, transformer
from pipekern.plan.fit import Plan, fit
from pipekern.plan.memory import FLOAT32, MIXED, ParameterBytes, RankMemory
from pipekern.plan.offload import Offload, Trip, choose_offload, offload_share
from pipekern.plan.partition import Partition, StageMemory, partition, partition_types

__all__ = [
    "FLOAT32",
    "MIXED",
    "Balance",
    "Choice",
    "Cluster",
    "Device",
    "Estimated",
    "Layer",
    "Link",
    "Measured",
    "Offload",
    "ParameterBytes",
    "Partition",
    "Plan",
    "RankMemory",
    "StageMemory",
    "Trip",
    "UnitCosts",
    "UnitMemory",
    "Work",
    "balance",
    "choose",
    "choose_codec",
    "choose_offload",
    "fit",
    "measured",
    "offload_share",
    "partition",
    "partition_types",
    "predicted",
    "transformer",
]
