"""Numbers before and after: parameters, multiply-accumulates, file size, latency, tokens; their report and pictures."""

from lightning_compress.report.compression import CompressionReport, StructureCount
from lightning_compress.report.pictures import save_token_picture, token_picture
from lightning_compress.report.rounds import Round
from lightning_compress.report.size import count_parameters, file_size
from lightning_compress.report.tokens import TokenSummary
from lightning_compress.timing import Latency, measure_latency

__all__ = [
    "CompressionReport",
    "Latency",
    "Round",
    "StructureCount",
    "TokenSummary",
    "count_parameters",
    "file_size",
    "measure_latency",
    "save_token_picture",
    "token_picture",
]
