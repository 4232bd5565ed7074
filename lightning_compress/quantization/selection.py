"""Which weights of a model are quantized, and how: by what they do in it, or by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_compress.discovery import trace_structures
from lightning_compress.discovery.tracer import evaluation
from lightning_compress.progress import Progress, quiet
from lightning_compress.quantization.activations import ActivationQuantizer, DynamicRange, LearnedRange
from lightning_compress.quantization.errors import QuantizationError
from lightning_compress.quantization_switch import quantization_off
from lightning_compress.quantizers import Quantizer, quantizer_named
from lightning_compress.structures import Structures
from lightning_compress.token_switch import tokens_off

WEIGHT_KINDS = ("attention", "ffn", "channel", "embedding", "head", "other")
PRODUCTS = ("attention", "ffn", "channel", "head", "other")  # all but tables
OF_STRUCTURES = {"head": "attention", "qk_dim": "attention", "vo_dim": "attention", "ffn": "ffn", "channel": "channel"}
# by name: what torch offers under several (functions, methods, operators), and in some versions only
LOOK_UPS = {"embedding", "embedding_bag"}
MULTIPLIES = {
    "linear",
    "bilinear",
    *(f"conv{transposed}{dims}d" for transposed in ("", "_transpose") for dims in (1, 2, 3)),
    "multi_head_attention_forward",
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
    "tensordot",
    "grouped_mm",
    "_grouped_mm",
}
Modules = str | Sequence[str] | Mapping[str, "str | Quantizer"] | None


class _Reads(TorchFunctionMode):
    """Notes which parameters are looked up in, and which are multiplied with, in the order in which that happens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.dim() > 1}
        self.found: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        called = getattr(func, "__name__", "")
        use = "look-up" if called in LOOK_UPS else "product" if called in MULTIPLIES else None
        if use is not None:
            for value in _tensors((*args, *(kwargs or {}).values())):
                base = value if value._base is None else value._base  # a part of a packed weight, or its transpose
                name = self._names.get(id(value)) or self._names.get(id(base))
                if name is not None:
                    self.found.setdefault(name, use)
        return func(*args, **(kwargs or {}))


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def weight_kinds(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    progress: Progress = quiet,
) -> dict[str, str]:
    """What the weights of a model do in one call of it: kinds by names of parameters.

    "attention": they make queries, keys, values or the output of attention; "ffn": of feed-forward units; "channel": of
    channels of convolutions; "embedding": tables in which rows are looked up; "head": products behind all of these and
    hidden units between them; "other": products before or between them. What is neither multiplied with activations nor
    looked up in (norms, biases, positions that are added) has no kind. A table that is multiplied with, too, is an
    "embedding".

    Args:
        model: any module; it is left as it was.
        args: positional arguments of one call.
        kwargs: its keyword arguments.
        progress: wraps what is gone through, as in ``discover``.
    """
    kwargs = dict(kwargs or {})
    structures = trace_structures(model, args, kwargs, progress=progress)
    owned: dict[str, str] = {}
    for structure in structures:
        kind = OF_STRUCTURES.get(structure.kind)
        if kind is not None:
            for name in structure.parameters:
                # heads are inside of a residual stream that may count as another kind: attention goes first
                owned[name] = kind if kind == "attention" else owned.get(name, kind)
    reads = _Reads(model)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with evaluation(model), torch.random.fork_rng(devices=devices), tokens_off(), quantization_off():
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        # with a graph, so that modules do not take fused paths, whose weights nobody sees
        with torch.inference_mode(False), torch.enable_grad(), reads:
            model(*args, **kwargs)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    order = list(reads.found)
    owned.update(dict.fromkeys(_last_hidden_units(structures, owned, reads.found, model), "head"))
    within = {name for name, kind in owned.items() if kind != "head"}
    last = max((number for number, name in enumerate(order) if name in within), default=-1)
    kinds: dict[str, str] = {}
    for number, (name, use) in enumerate(reads.found.items()):
        if use == "look-up":
            kinds[name] = "embedding"
        else:
            kinds[name] = owned.get(name, "head" if number > last >= 0 else "other")
    return kinds


def _last_hidden_units(
    structures: Structures, owned: Mapping[str, str], uses: Mapping[str, str], model: nn.Module
) -> tuple[str, ...]:
    """Weights of units between the last two products, where these lead out of the width that they came from.

    So does the classifier behind a pooled token; the last feed-forward part of a stack leads back to its width.
    """
    products = [name for name, use in uses.items() if use == "product"]
    if not products or owned.get(products[-1]) != "ffn":
        return ()
    structure = next(s for s in structures if s.kind == "ffn" and products[-1] in s.parameters)
    parameters = dict(model.named_parameters())
    sizes = {name: parameters[name].shape for name in structure.parameters if name in uses}
    outside = sizes.pop(products[-1])
    if any(set(size) & set(outside) - {structure.units} for size in sizes.values()):
        return ()
    return structure.parameters


def select_weights(kinds: Mapping[str, str], weights: str | Quantizer | None, modules: Modules) -> dict[str, Quantizer]:
    """Quantizers by names of parameters.

    Args:
        kinds: what ``weight_kinds`` found.
        weights: the quantizer of those that ``modules`` does not say another for.
        modules: kinds or patterns of names of modules ("encoder.*.query", with ``*`` and ``?``), or a mapping from them
            to quantizers, of which the last that fits counts. None: everything that is multiplied with activations.

    Raises:
        QuantizationError: for a kind or pattern that nothing fits, with what there is; if no quantizer is given.
        ValueError: for a quantizer that does not exist.
    """
    if isinstance(modules, str):
        modules = (modules,)
    if modules is None:
        modules = [kind for kind in PRODUCTS if kind in kinds.values()]
        if not modules:
            raise QuantizationError(f"Expected weights to quantize, but the model has none of the kinds {PRODUCTS}.")
    wanted = modules if isinstance(modules, Mapping) else dict.fromkeys(modules, weights)
    chosen: dict[str, Quantizer] = {}
    for key, quantizer in wanted.items():
        found = [name for name, kind in kinds.items() if _fits(key, name, kind)]
        if not found:
            there = {kind: sum(k == kind for k in kinds.values()) for kind in WEIGHT_KINDS}
            raise QuantizationError(
                f"Expected a kind of weights or a pattern of names that fits some, but {key!r} fits none. There are "
                f"{', '.join(f'{number} of kind {kind!r}' for kind, number in there.items() if number)}, in modules "
                f"such as {', '.join(repr(n.rpartition('.')[0]) for n in list(kinds)[:4])}."
            )
        if quantizer is None:
            raise QuantizationError(
                f"Expected a quantizer for {key!r}, but got none: give weights=..., or a mapping, "
                f"modules={{{key!r}: 'int8'}}."
            )
        chosen.update(dict.fromkeys(found, quantizer_named(quantizer)))
    return {name: chosen[name] for name in kinds if name in chosen}


def activation_named(name: str | ActivationQuantizer) -> ActivationQuantizer:
    """The quantizer of activations of a short name, or a quantizer as it is.

    "int8" to "int2" are ``DynamicRange``, the range of every call; "lsq8" to "lsq2" ``LearnedRange``.

    Raises:
        ValueError: for another name.
    """
    if isinstance(name, ActivationQuantizer):
        return name
    found = re.fullmatch(r"(int|lsq)([2-8])", name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(
            f"Expected a quantizer of activations or one of 'int8' to 'int2' and 'lsq8' to 'lsq2', but got {name!r}."
        )
    return DynamicRange(int(found[2])) if found[1] == "int" else LearnedRange(int(found[2]))


def select_inputs(
    model: nn.Module, kinds: Mapping[str, str], weights: Iterable[str], quantizer: ActivationQuantizer
) -> dict[str, ActivationQuantizer]:
    """The quantizer by paths of modules, for all that multiply their input with one of the weights.

    Args:
        model: the model.
        kinds: what ``weight_kinds`` found.
        weights: names of parameters; tables of embeddings have no inputs to quantize.
        quantizer: for all of them.
    """
    paths = dict.fromkeys(name.rpartition(".")[0] for name in weights if kinds[name] != "embedding")
    modules = dict(model.named_modules())
    # a module with others inside does more with its input than multiply it
    return {path: quantizer for path in paths if not any(modules[path].children())}


def _fits(key: str, name: str, kind: str) -> bool:
    if key in WEIGHT_KINDS:
        return key == kind
    return fnmatchcase(name, key) or fnmatchcase(name.rpartition(".")[0], key)


__all__ = [
    "PRODUCTS",
    "WEIGHT_KINDS",
    "Modules",
    "activation_named",
    "select_inputs",
    "select_weights",
    "weight_kinds",
]
