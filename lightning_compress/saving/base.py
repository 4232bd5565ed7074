"""The dense model that a saved one is rebuilt from, where transformers knows how to build it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_compress.quantization import plain_class
from lightning_compress.saving.manifest import Base
from lightning_compress.surgery.record import dense_config

# What a configuration must not bring along: code and weights from elsewhere.
DROPPED = frozenset({"auto_map", "custom_pipelines", "trust_remote_code", "quantization_config"})
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
DEEPEST = 32
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def base_of(model: nn.Module) -> Base | None:
    """The class and dense configuration of a model of transformers; None for any other model."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    name, kind = type(model).__name__, plain_class(model)
    config = dense_config(model)
    if getattr(transformers, name, None) is not kind or config is None:
        return None  # a class of the user's own: nobody else can import it
    return Base(name, _encoded(config))


def build(base: Base) -> nn.Module:
    """The dense model of ``base``, with random weights.

    Raises:
        ImportError: without transformers, naming the extra.
        ValueError: if there is no such model, or its configuration wants code or weights from elsewhere.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError(
            f"Expected transformers to be installed, because the saved model is its {base.name}, but it is not. "
            "Install lightning-compress[hf], or pass a factory: load_compressed(folder, factory)."
        ) from None
    kind = getattr(transformers, base.name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"Expected a model of transformers {transformers.__version__}, but it has no {base.name!r}. Another "
            "version may; or pass a factory: load_compressed(folder, factory)."
        )
    config: Any = _decoded(base.config, 0)
    model_type: Any = kind
    try:
        return model_type(model_type.config_class.from_dict(config))
    except Exception as failure:  # whatever a configuration that nobody vouches for makes of the constructor
        raise ValueError(
            f"Expected the saved configuration to build a {base.name}, but it raised {type(failure).__name__}: "
            f"{failure}"
        ) from failure


def _encoded(value: Any) -> Any:
    """Plain JSON: numbers that JSON lacks as {"float": "inf"}, other objects as text."""
    if isinstance(value, Mapping):
        return {str(key): _encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_encoded(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value).removeprefix("torch.")


def _decoded(value: Any, depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError(f"Expected a configuration at most {DEEPEST} levels deep, but it is deeper.")
    if isinstance(value, list):
        return [_decoded(item, depth + 1) for item in value]
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"float"} and value["float"] in _FLOATS:
        return _FLOATS[value["float"]]
    result = {key: _decoded(item, depth + 1) for key, item in value.items() if key not in DROPPED}
    for key in ("attn_implementation", "_attn_implementation"):
        if result.get(key) is not None and result[key] not in ATTENTION:
            raise ValueError(
                f"Expected {key} of the saved configuration to be one of {ATTENTION}, but got {result[key]!r}: kernels "
                "from elsewhere are not loaded."
            )
    if result.get("use_pretrained_backbone"):
        result["use_pretrained_backbone"] = False  # the weights are in the file
    return result


__all__ = ["base_of", "build"]
