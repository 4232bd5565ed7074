"""The tail of a layer: what comes after its attention and treats every token by itself, as a feed-forward part does.

A token that the attention of a layer decides against need not go through the tail of that layer any more. The tail is a
span of calls of sub-modules, found in one run of an example: from the first to the last of them that owns a matrix.
Whether it really treats every token by itself is for the proof to say; here are only candidates.

In the tail all tokens that are left stand in one row (1, tokens, width): there is no padding, whatever the lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.tokens.arguments import output_state, tensors_in, with_tensors
from lightning_compress.tokens.errors import TokenPruningError
from lightning_compress.tokens.stack import LayerCall, TokenStack, TokenTail

MOST = 12  # candidates


def find_tails(model: nn.Module, calls: Sequence[LayerCall], stack: TokenStack) -> list[TokenTail]:
    """Spans of calls that may be the tail of every layer of the stack, the ones with the most parameters first.

    Args:
        model: the model that was run.
        calls: the recorded calls of the run in which the stack was found.
        stack: the stack.
    """
    layers = [call for call in calls if call.name in stack.layers and call.state == stack.state and call.attention]
    found = [_candidates(model, calls, layer) for layer in {call.name: call for call in layers}.values()]
    if not found:
        return []
    common = [tail for tail in found[0] if all(tail in other for other in found[1:])]
    return sorted(common, key=lambda tail: -found[0][tail])[:MOST]


def _candidates(model: nn.Module, calls: Sequence[LayerCall], layer: LayerCall) -> dict[TokenTail, int]:
    """Spans in one call of a layer, with the number of their parameters."""
    assert layer.hidden is not None
    shape = layer.hidden.shape[:2]
    around = layer
    while len(inner := [call for call in calls if call.parent is around]) == 1 and inner[0].attention:
        around = inner[0]
    behind = [call for call in inner if call.number >= around.heard_at]
    names = [call.name for call in inner]
    spans: dict[TokenTail, int] = {}
    owners = [n for n, call in enumerate(behind) if _matrices(model.get_submodule(call.name))]
    for i, first in enumerate(owners):
        for last in owners[i:]:
            ends = behind[first], behind[last]
            output = ends[1].output
            if any(names.count(end.name) > 1 for end in ends) or not _by_token(ends[0], shape):
                continue
            if not isinstance(output, Tensor) or output.dim() != 3 or output.shape[:2] != shape:
                continue
            prefix = f"{layer.name}." if layer.name else ""
            begin, end = (call.name.removeprefix(prefix) for call in ends)
            size = sum(_matrices(model.get_submodule(call.name)) for call in behind[first : last + 1])
            spans[TokenTail(begin, end, _base(*ends, layer))] = size
    return spans


def _matrices(module: nn.Module) -> int:
    """Number of elements of the parameters with at least two dims."""
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def _by_token(call: LayerCall, shape: torch.Size) -> bool:
    first = next((value for _, value in tensors_in(call.args, call.kwargs)), None)
    return first is not None and first.dim() == 3 and first.shape[:2] == shape


def _base(first: LayerCall, last: LayerCall, layer: LayerCall) -> str:
    """What a token has in the place of the output of the tail if it does not go through it.

    Where the last call is also given a state of the shape of its output, that is the state to which the tail adds;
    where it returns the state of the layer and has one argument, that argument; elsewhere something is added after the
    tail, and it is zero.
    """
    assert isinstance(last.output, Tensor)
    tensors = list(tensors_in(last.args, last.kwargs))
    others = [path for path, value in tensors[1:] if value.shape == last.output.shape and value.is_floating_point()]
    if len(others) == 1:
        return others[0]
    whole = last.output is output_state(layer.output) and tensors[0][1].shape == last.output.shape
    return tensors[0][0] if whole and first is last else ""


@dataclass(eq=False)
class TailPass:
    """One pass of some rows through the tail of a layer.

    Args:
        tail: where it is.
        rows: (batch, slots) of the rows.
        keep: bool (batch, slots), tokens that go through; None if none is left out.
        soft: mask (batch, slots) with gradients, in place of ``keep``.
        flat: int64, positions of the tokens that go through in the flattened rows; None if all are computed.
    """

    tail: TokenTail
    rows: tuple[int, int]
    keep: Tensor | None = None
    soft: Tensor | None = None
    flat: Tensor | None = None

    def run(
        self, original: Callable[..., Any], last: bool, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
    ) -> Any:
        """A call at the begin or at the end of the tail."""
        if self.keep is None and self.soft is None:
            return original(*args, **kwargs)
        given = (args, kwargs)
        if self.flat is not None:
            given = with_tensors(args, kwargs, lambda _, value: self._gathered(value))
        output = original(*given[0], **given[1])
        return self._together(output, dict(tensors_in(args, kwargs)), name) if last else output

    def _gathered(self, value: Tensor) -> Tensor:
        assert self.flat is not None
        if value.dim() < 2 or value.shape[:2] != self.rows:
            return value
        return value.reshape(-1, *value.shape[2:]).index_select(0, self.flat).unsqueeze(0)

    def _together(self, output: Any, arguments: dict[str, Tensor], name: str) -> Tensor:
        """The output for all tokens: those that did not go through have the base."""
        wanted = self.rows if self.flat is None else (1, self.flat.shape[0])
        base = arguments.get(self.tail.base)
        shape = (*self.rows, *output.shape[2:]) if isinstance(output, Tensor) else ()
        if not isinstance(output, Tensor) or output.shape[:2] != wanted or (base is not None and base.shape != shape):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TokenPruningError(
                f"Expected {name!r}, behind the attention of its layer, to return one state for each of {wanted} "
                f"tokens, as in the example that token pruning was set up with, but got {got}."
            )
        base = output.new_zeros(shape) if base is None else base.to(output.dtype)
        if self.flat is not None:
            width = output.shape[2:]
            full = base.reshape(-1, *width).index_copy(0, self.flat, output.reshape(-1, *width))
            return full.view(shape)
        if self.soft is not None:
            return base + self.soft.unsqueeze(-1).to(output.dtype) * (output - base)
        assert self.keep is not None
        return torch.where(self.keep.unsqueeze(-1), output, base)


def tail_names(stack: TokenStack, layer: str) -> Iterator[tuple[str, bool, bool]]:
    """Modules of a layer at which its tail begins and ends: path, whether it begins there, whether it ends there."""
    if stack.tail is None:
        return
    prefix = f"{layer}." if layer else ""
    for path in dict.fromkeys((stack.tail.first, stack.tail.last)):
        yield prefix + path, path == stack.tail.first, path == stack.tail.last


__all__ = ["TailPass", "find_tails", "tail_names"]
