"""Short names of quantizers."""

from __future__ import annotations

import re

from lightning_compress.quantizers.base import Quantizer
from lightning_compress.quantizers.binary import Binary, Ternary
from lightning_compress.quantizers.learned import LearnedStep
from lightning_compress.quantizers.uniform import Uniform

NAMES = "'int16', 'int8' to 'int2', 'lsq8' to 'lsq2', 'ternary', 'binary'"


def quantizer_named(name: str | Quantizer) -> Quantizer:
    """The quantizer of a short name, or a quantizer as it is.

    All go by rows: "int4" is ``Uniform(4)``, "lsq4" ``LearnedStep(4)``, "binary" ``Binary()``.

    Raises:
        ValueError: for another name.

    >>> quantizer_named("int4")
    Uniform(bits=4, scope='row', symmetric=True)
    """
    if isinstance(name, Quantizer):
        return name
    if name == "int16":
        return Uniform(16)
    found = re.fullmatch(r"(int|lsq)([2-8])", name) if isinstance(name, str) else None
    if found is not None:
        return Uniform(int(found[2])) if found[1] == "int" else LearnedStep(int(found[2]))
    if name == "binary":
        return Binary()
    if name == "ternary":
        return Ternary()
    hint = " One bit is 'binary'." if name in ("int1", "lsq1") else ""
    raise ValueError(f"Expected a quantizer or one of {NAMES}, but got {name!r}.{hint}")


__all__ = ["quantizer_named"]
