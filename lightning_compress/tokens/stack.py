"""Finding the stack of layers by its structure, from one run of an example: no class names, no registry.

A layer is a module that maps (batch, tokens, width) to the same shape with exactly one attention over its tokens
inside; a stack is a chain of calls of layers in which each gets what the one before returned. One module may be called
many times.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_compress.tokens.arguments import output_state, tensors_in
from lightning_compress.tokens.errors import TokenPruningError
from lightning_compress.tokens.tap import MULTI_HEAD, SDPA, SOFTMAX, with_inner_attention


@dataclass(frozen=True)
class TokenTail:
    """The part of every layer, behind its attention, that a token does not need which the layer decides against.

    Args:
        first: path of the sub-module with which it begins, from the layer.
        last: path of the sub-module with which it ends.
        base: argument of the last one, as ``args.1``, that stands for its output for tokens that were left out; "" for
            zeros.
    """

    first: str
    last: str
    base: str = ""


@dataclass(frozen=True)
class TokenStack:
    """Where tokens can leave a model.

    Args:
        owner: path of the module whose forward calls the layers; "" for the model itself.
        layers: path of the layer of each call, in order; a shared layer occurs several times.
        state: path of the hidden state in the arguments of a layer, as ``args.0`` or ``kwargs.hidden_states``.
        dims: dims of other arguments that run over tokens, by path, counted from the end (negative).
        tokens: number of tokens in the example.
        width: width of the hidden state.
        tail: what tokens skip in the layer that decides against them; None if they leave after it.
        attention: path of the sub-module that computes the attention, from the layer; "" for the layer itself.
    """

    owner: str
    layers: tuple[str, ...]
    state: str
    dims: Mapping[str, tuple[int, ...]]
    tokens: int
    width: int
    tail: TokenTail | None = None
    attention: str = ""


@dataclass(eq=False)
class LayerCall:
    """One call of a module in the example's run, the ``number``-th of all."""

    name: str
    parent: LayerCall | None
    number: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    attention: list[tuple[int, int, int]] = field(
        default_factory=list
    )  # (rows, queries, keys) of every attention inside
    heard_at: int = -1  # number of the first call after the last attention inside
    state: str = ""
    hidden: Tensor | None = None

    def ancestors(self) -> Iterator[LayerCall]:
        """The calls around this one, innermost first."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent


class _Recorder(TorchFunctionMode):
    """Notes calls of modules and the attention inside them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LayerCall] = []
        self.current: LayerCall | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            query, key = args[0] if args else kwargs["query"], args[1] if len(args) > 1 else kwargs["key"]
            self._note(query.shape[0], query.shape[-2], key.shape[-2])
        elif func in SOFTMAX:
            logits = args[0] if args else kwargs.get("input")
            if isinstance(logits, Tensor) and logits.dim() in (3, 4):
                self._note(logits.shape[0], logits.shape[-2], logits.shape[-1])
        elif func is MULTI_HEAD:
            return with_inner_attention(self, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, rows: int, queries: int, keys: int) -> None:
        if self.current is None:
            return
        for call in (self.current, *self.current.ancestors()):
            call.attention.append((rows, queries, keys))
            call.heard_at = len(self.calls)

    def enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.current = LayerCall(name, self.current, len(self.calls), args, kwargs)
            self.calls.append(self.current)

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.current is not None:
            self.current.output = output
            self.current = self.current.parent


@dataclass
class _Fused:
    """The switch of the fused encoder layer is one for all threads: the last one to leave sets it back."""

    lock: Any = field(default_factory=threading.Lock)
    held: int = 0
    before: bool = True


_fused = _Fused()


@contextmanager
def python_attention() -> Iterator[None]:
    """PyTorch's fused encoder layer off: it would hide the attention."""
    with _fused.lock:
        if not _fused.held:
            _fused.before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _fused.held += 1
    try:
        yield
    finally:
        with _fused.lock:
            _fused.held -= 1
            if not _fused.held:
                torch.backends.mha.set_fastpath_enabled(_fused.before)


def record_calls(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[LayerCall]:
    """All calls of modules in one run of ``model``, in the order in which they began."""
    recorder = _Recorder()
    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(recorder.enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.leave))
        with torch.no_grad(), python_attention(), recorder:
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.calls


def stack_of(calls: list[LayerCall]) -> TokenStack:
    """The longest stack in recorded calls."""
    chain = max(_chains(_layers(calls)), key=len, default=[])
    if len(chain) < 2:
        raise TokenPruningError(_nothing(calls))
    around = list(chain[0].ancestors())
    owner = next(call for call in around if all(call in layer.ancestors() for layer in chain))
    hidden = chain[0].hidden
    assert hidden is not None
    batch, tokens, width = hidden.shape
    dims: dict[str, tuple[int, ...]] = {}
    for layer in chain:
        for path, value in tensors_in(layer.args, layer.kwargs):
            if path == layer.state:
                continue
            found = token_dims(value, batch, tokens)
            if found and found[0] == -value.dim():
                raise TokenPruningError(
                    f"Expected every argument of the layer {layer.name!r} that runs over tokens to begin with the "
                    f"batch, but {path} has the shape {tuple(value.shape)} with {tokens} tokens: one mask or position "
                    "table for all rows cannot follow tokens that leave row by row. Pass it with a batch dim, or as a "
                    "padding mask (batch, tokens)."
                )
            dims[path] = found
    names, attention = tuple(c.name for c in chain), {_attention(calls, layer) for layer in chain}
    return TokenStack(
        owner.name,
        names,
        chain[0].state,
        dims,
        int(tokens),
        int(width),
        attention=attention.pop() if len(attention) == 1 else "",
    )


def _attention(calls: list[LayerCall], layer: LayerCall) -> str:
    """Path of the innermost call with the attention of a layer, from the layer."""
    inside = layer
    while len(inner := [call for call in calls if call.parent is inside and call.attention]) == 1:
        inside = inner[0]
    return inside.name.removeprefix(layer.name).removeprefix(".")


def token_dims(value: Tensor, batch: int, tokens: int) -> tuple[int, ...]:
    """Dims of ``value`` that may run over tokens, by their size, counted from the end."""
    start = 1 if value.dim() and value.shape[0] in (1, batch) else 0
    return tuple(dim - value.dim() for dim in range(start, value.dim()) if value.shape[dim] == tokens)


def sure_dims(value: Tensor, batch: int, tokens: int) -> tuple[int, ...] | None:
    """``token_dims`` of an argument that the example did not have; None where the sizes leave it open."""
    dims = token_dims(value, batch, tokens)
    if value.dim() < 4 and batch == tokens and value.dim() and value.shape[0] == tokens:
        return None  # rows and tokens cannot be told apart
    if not dims:
        return ()
    if value.shape[0] not in (1, batch) or not (len(dims) == 1 or (value.dim() == 4 and dims == (-2, -1))):
        return None
    return dims


def _layers(calls: list[LayerCall]) -> list[LayerCall]:
    """Outermost calls that are layers."""
    layers: dict[int, LayerCall] = {}
    for call in calls:
        if any(id(outer) in layers for outer in call.ancestors()):
            continue
        output = output_state(call.output)
        if len(call.attention) != 1 or output is None or output.dim() != 3 or not output.is_floating_point():
            continue
        rows, queries, keys = call.attention[0]
        batch, tokens, _ = output.shape
        if queries != tokens or keys != tokens or rows % batch:
            continue
        inputs = tensors_in(call.args, call.kwargs)
        found = next(((p, v) for p, v in inputs if v.shape == output.shape and v.is_floating_point()), None)
        if found is None or call.parent is None:
            continue
        call.state, call.hidden = found
        layers[id(call)] = call
    return list(layers.values())


def _chains(layers: list[LayerCall]) -> Iterator[list[LayerCall]]:
    chain: list[LayerCall] = []
    for layer in layers:
        if chain and layer.hidden is not output_state(chain[-1].output):
            yield chain
            chain = []
        chain.append(layer)
    if chain:
        yield chain


def _nothing(calls: list[LayerCall]) -> str:
    layers = _layers(calls)
    message = (
        "Expected a stack of at least two layers that map (batch, tokens, width) to the same shape, each with one "
        "attention over its tokens, but found "
    )
    if layers:
        message += f"layers without a chain: {[layer.name for layer in layers[:4]]}. "
        message += "Token pruning needs each to be called with what the one before returned."
        return message
    blocks = [c for c in calls if len(c.attention) == 1 and (s := output_state(c.output)) is not None and s.dim() >= 3]
    outer = next((c for c in blocks if c.parent is None or c.parent not in blocks), None)
    if outer is None:
        seen = {shape for call in calls for shape in call.attention}
        message += (
            f"attention of (rows, queries, keys) {sorted(seen)[:4]} inside no such layer. "
            if seen
            else "no attention. "
        )
        message += (
            "Token pruning needs attention that runs through torch's scaled_dot_product_attention or through a softmax "
            "(in transformers, attn_implementation='sdpa' or 'eager')."
        )
        return message
    state = output_state(outer.output)
    assert state is not None
    rows, queries, keys = outer.attention[0]
    message += (
        f"{outer.name!r}, which returns {tuple(state.shape)} and whose attention has {rows} rows of {queries} queries "
        f"and {keys} keys. "
    )
    if state.dim() == 3 and queries == keys == state.shape[0]:
        return message + "It has the tokens first: build it with batch_first=True."
    if (state.dim() == 3 and rows > state.shape[0]) or state.dim() == 4:
        return message + "Attention within windows, or over a map: tokens that leave would move the others."
    return message + "Every token must attend to every token of its row."


__all__ = [
    "LayerCall",
    "TokenStack",
    "TokenTail",
    "python_attention",
    "record_calls",
    "stack_of",
    "sure_dims",
    "token_dims",
]
