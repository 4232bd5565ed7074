"""Saving compressed models and building them again, without pickle."""

from lightning_compress.saving.load import load_compressed, read_manifest
from lightning_compress.saving.manifest import Manifest
from lightning_compress.saving.save import save_compressed

__all__ = ["Manifest", "load_compressed", "read_manifest", "save_compressed"]
