"""Surgery: a plan and a model -> a smaller model with the same outputs, or an error and the model untouched."""

from lightning_compress.surgery.apply import StructureReport, SurgeryReport, apply_plan
from lightning_compress.surgery.errors import SurgeryError
from lightning_compress.surgery.proof import prove
from lightning_compress.surgery.zero import silence_units, zero_units

__all__ = ["StructureReport", "SurgeryError", "SurgeryReport", "apply_plan", "prove", "silence_units", "zero_units"]
