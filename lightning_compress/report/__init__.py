"""Numbers before and after: parameters, multiply-accumulates, file size, measured latency, and a report of them."""

from lightning_compress.report.compression import CompressionReport, StructureCount
from lightning_compress.report.rounds import Round
from lightning_compress.report.size import count_parameters, file_size
from lightning_compress.timing import Latency, measure_latency

__all__ = [
    "CompressionReport",
    "Latency",
    "Round",
    "StructureCount",
    "count_parameters",
    "file_size",
    "measure_latency",
]
