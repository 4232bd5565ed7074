"""Quantizers as JSON objects, for files that nobody vouches for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from lightning_compress.quantization.activations import ActivationQuantizer, DynamicRange, LearnedRange, ObservedRange
from lightning_compress.quantization.errors import QuantizationError
from lightning_compress.quantizers import Binary, LearnedStep, Quantizer, Stochastic, Ternary, Uniform
from lightning_compress.quantizers.stochastic import Norm
from lightning_compress.strict_json import StrictReader

READER = StrictReader("quantization record")
LARGEST = 1e300  # of a number
_Read = Callable[[Any, str], Any]


def _optional(read: _Read) -> _Read:
    return lambda value, path: None if value is None else read(value, path)


def _bits(value: Any, path: str) -> int:
    return READER.integer(value, path, 1, 8)


def _number(value: Any, path: str) -> float:
    return READER.number(value, path, -LARGEST, LARGEST)


def _norm(value: Any, path: str) -> str:
    return READER.string(value, path, get_args(Norm))


def _uniform_bits(value: Any, path: str) -> int:
    return READER.integer(value, path, 1, 16)


WEIGHTS: Mapping[str, tuple[type[Quantizer], Mapping[str, _Read]]] = {
    "uniform": (Uniform, {"bits": _uniform_bits, "scope": READER.string, "symmetric": READER.boolean}),
    "stochastic": (
        Stochastic,
        {"bits": _bits, "norm": _norm, "scope": READER.string, "strict": READER.boolean},
    ),
    "binary": (
        Binary,
        {
            "scope": READER.string,
            "centred": READER.boolean,
            "scaled": READER.boolean,
            "clip": _optional(_number),
            "size": _number,
        },
    ),
    "ternary": (Ternary, {"scope": READER.string}),
    "learned_step": (LearnedStep, {"bits": _bits, "scope": READER.string}),
}
ACTIVATIONS: Mapping[str, tuple[type[ActivationQuantizer], Mapping[str, _Read]]] = {
    "dynamic_range": (DynamicRange, {"bits": _bits, "reduced": _optional(READER.boolean)}),
    "observed_range": (ObservedRange, {"bits": _bits, "momentum": _number}),
    "learned_range": (LearnedRange, {"bits": _bits, "signed": _optional(READER.boolean)}),
}


def quantizer_state(quantizer: Quantizer) -> dict[str, Any]:
    """The quantizer of a weight as a JSON object: its kind and its settings.

    Raises:
        QuantizationError: for a quantizer that is none of this library.

    >>> quantizer_state(Uniform(4))
    {'kind': 'uniform', 'bits': 4, 'scope': 'row', 'symmetric': True}
    """
    return _state(quantizer, WEIGHTS)


def quantizer_from(value: object, path: str) -> Quantizer:
    """The quantizer of a JSON object.

    Args:
        value: parsed JSON.
        path: where it lies in its file, for messages.

    Raises:
        ValueError: for anything else than what ``quantizer_state`` returns; the message says what was expected where.
    """
    return _from(value, path, WEIGHTS)


def activation_state(quantizer: ActivationQuantizer) -> dict[str, Any]:
    """The quantizer of activations as a JSON object; see ``quantizer_state``."""
    return _state(quantizer, ACTIVATIONS)


def activation_from(value: object, path: str) -> ActivationQuantizer:
    """The quantizer of activations of a JSON object; see ``quantizer_from``."""
    return _from(value, path, ACTIVATIONS)


def _state(quantizer: Any, kinds: Mapping[str, tuple[type, Mapping[str, _Read]]]) -> dict[str, Any]:
    for kind, (own, fields) in kinds.items():
        if type(quantizer) is own:
            settings: dict[str, Any] = {name: getattr(quantizer, name) for name in fields}
            return {"kind": kind, **settings}
    raise QuantizationError(
        f"Expected a quantizer that can be saved, {', '.join(own.__name__ for own, _ in kinds.values())}, but got "
        f"{type(quantizer).__name__}. A saved model holds no code of its own: use one of these."
    )


def _from(value: object, path: str, kinds: Mapping[str, tuple[type[Any], Mapping[str, _Read]]]) -> Any:
    kind = READER.string(READER.mapping(value, path).get("kind"), f"{path}.kind", tuple(kinds))
    own, fields = kinds[kind]
    data = READER.object(value, path, ("kind", *fields))
    settings = {name: read(data[name], f"{path}.{name}") for name, read in fields.items()}
    try:
        return own(**settings)
    except ValueError as error:
        raise ValueError(f"Malformed {READER.what}: in {path}: {error}") from None


__all__ = ["activation_from", "activation_state", "quantizer_from", "quantizer_state"]
