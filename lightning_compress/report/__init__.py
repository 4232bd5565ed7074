"""Numbers before and after: parameters, multiply-accumulates, file size, latency, tokens; maps, reports, pictures."""

from lightning_compress.report.compression import CompressionReport, StructureCount
from lightning_compress.report.history import FitHistory
from lightning_compress.report.html import write_html
from lightning_compress.report.map_pictures import draw_maps
from lightning_compress.report.maps import ModelMaps, model_maps
from lightning_compress.report.matrix_maps import MatrixMap, matrix_map
from lightning_compress.report.pictures import save_token_picture, token_picture
from lightning_compress.report.rounds import Round
from lightning_compress.report.size import count_parameters, file_size
from lightning_compress.report.tokens import TokenSummary
from lightning_compress.report.unit_maps import UnitMap
from lightning_compress.timing import Latency, measure_latency

__all__ = [
    "CompressionReport",
    "FitHistory",
    "Latency",
    "MatrixMap",
    "ModelMaps",
    "Round",
    "StructureCount",
    "TokenSummary",
    "UnitMap",
    "count_parameters",
    "draw_maps",
    "file_size",
    "matrix_map",
    "measure_latency",
    "model_maps",
    "save_token_picture",
    "token_picture",
    "write_html",
]
