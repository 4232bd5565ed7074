"""Latency on this device: measured for each structure at several widths, cached, and met by a plan."""

from lightning_compress.latency.loop import LatencyGoal, LatencyMet
from lightning_compress.latency.measuring import measure_latency_table, narrowed_copy
from lightning_compress.latency.model import LatencyModel
from lightning_compress.latency.table import LatencyRow, LatencyTable

__all__ = [
    "LatencyGoal",
    "LatencyMet",
    "LatencyModel",
    "LatencyRow",
    "LatencyTable",
    "measure_latency_table",
    "narrowed_copy",
]
