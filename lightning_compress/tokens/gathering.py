"""Index functions that take tokens out of a batch and put their states back."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Multiply-accumulates that a processor does in the time that one more call of a layer takes, which is that of its
# operations, however small: a millisecond or two. On two cores all from 1e8 to 8e8 served; the other is an estimate
CALL = {"cpu": 2e8}
CALL_OF_ACCELERATORS = 2e10
# what a token costs a layer that has hardly a weight left, per dim of its state: normalization, sums, copies
PER_DIM = 64


@dataclass(frozen=True)
class Repacking:
    """Which tokens of a batch stay, and where.

    Args:
        index: int64 (batch, kept), positions in the batch before; slots that a row does not fill hold the position of
            a token that does not stay, or of any other.
        valid: bool (batch, kept), False for slots that a row does not fill; None if all rows fill all.
        flat: int64 (batch * kept), the same positions in the flattened batch.
        counts: number of tokens that stay, of each row.
    """

    index: Tensor
    valid: Tensor | None
    flat: Tensor
    counts: tuple[int, ...]


def repack(keep: Tensor, multiple: int = 1) -> Repacking:
    """Pack the kept tokens of every row to the left, in their order.

    Args:
        keep: bool (batch, tokens), at least one True.
        multiple: the number of slots is rounded up to a multiple of this, as far as there are tokens.
    """
    batch, tokens = keep.shape
    if batch == 1 and multiple == 1:
        index = keep[0].nonzero().squeeze(1)  # (kept,)
        return Repacking(index.unsqueeze(0), None, index, (index.shape[0],))
    counts = keep.sum(1)  # (batch,)
    numbers = tuple(counts.tolist())
    most = max(1, *numbers)
    slots = min(tokens, -(-most // multiple) * multiple)
    # a stable sort brings the kept tokens to the front without changing their order
    index = torch.sort(keep.logical_not().to(torch.uint8), dim=1, stable=True).indices[:, :slots]
    full = min(numbers) == slots
    valid = None if full else torch.arange(slots, device=keep.device) < counts.unsqueeze(1)
    flat = (index + torch.arange(batch, device=keep.device).unsqueeze(1) * tokens).reshape(-1)
    return Repacking(index, valid, flat, numbers)


@dataclass(frozen=True)
class RowGroup:
    """Rows of a batch that are computed together.

    Args:
        rows: their numbers.
        slots: so many slots the longest of them fills.
    """

    rows: tuple[int, ...]
    slots: int


def group_rows(counts: tuple[int, ...], saving: int, most: int = 4) -> list[RowGroup]:
    """Rows of similar length together: what a group does not fill is computed for nothing.

    Starting from one group, the cut that saves the most slots is made, as long as it saves enough.

    Args:
        counts: number of tokens of each row.
        saving: slots that a cut must save, the price of one more call.
        most: so many groups at most.
    """
    order = sorted(range(len(counts)), key=lambda row: -counts[row])
    sizes = [counts[row] for row in order]
    cuts = [0, len(order)]
    while len(cuts) <= most:
        best, where = 0, 0
        for start, stop in itertools.pairwise(cuts):
            for cut in range(start + 1, stop):
                saved = (stop - cut) * (sizes[start] - sizes[cut])
                if saved > best:
                    best, where = saved, cut
        if best < saving:
            break
        cuts = sorted([*cuts, where])
    return [RowGroup(tuple(order[a:b]), sizes[a]) for a, b in itertools.pairwise(cuts)]


def slots_worth_a_call(layer: nn.Module, width: int, device: torch.device) -> int:
    """How many slots of a layer take as long as one more call of it.

    A slot costs about a multiply-accumulate per weight, so that a cut is worth less the more was removed from a layer.

    Args:
        layer: the layer as it is now.
        width: of its hidden state.
        device: where it runs.
    """
    call = CALL.get(device.type, CALL_OF_ACCELERATORS)
    return max(1, round(call / (_weights(layer) + PER_DIM * width)))


def _weights(layer: nn.Module) -> int:
    """Weights that every token is multiplied with."""
    weights = 0
    for module in layer.modules():
        sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):  # also where the weight itself is packed
            weights += sizes[0] * sizes[1]
        else:
            weights += sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
    return weights


def gather_states(states: Tensor, packing: Repacking) -> Tensor:
    """States (batch, tokens, ...) of the tokens that stay, (batch, kept, ...)."""
    batch, tokens = states.shape[:2]
    rows = states.reshape(batch * tokens, *states.shape[2:]).index_select(0, packing.flat)
    return rows.view(batch, -1, *states.shape[2:])


def gather_dims(value: Tensor, dims: tuple[int, ...], index: Tensor) -> Tensor:
    """``value`` narrowed to the same tokens along several of its dims.

    Args:
        value: (batch or 1, ...), with ``tokens`` entries along each of ``dims``.
        dims: which dims run over tokens, none of them the first.
        index: int64 (batch, kept).
    """
    batch, kept = index.shape
    if value.shape[0] != batch:
        value = value.expand(batch, *value.shape[1:])
    for dim in dims:
        if value.stride(dim) == 0:  # one value for all tokens
            value = value.narrow(dim, 0, kept)
            continue
        shape = [batch] + [1] * (value.dim() - 1)
        shape[dim] = kept
        target = list(value.shape)
        target[dim] = kept
        value = value.gather(dim, index.view(shape).expand(target))
    return value


def scatter_states(full: Tensor, states: Tensor, index: Tensor, valid: Tensor | None, fresh: bool = False) -> Tensor:
    """``full`` (batch, tokens, width) with ``states`` (batch, kept, width) written to their positions.

    Args:
        full: states of all tokens.
        states: those to write.
        index: int64 (batch, kept), their positions.
        valid: bool (batch, kept), which of them are meant; None for all.
        fresh: nothing else holds ``full``: it is written to, where otherwise a new tensor is made.
    """
    batch, tokens = full.shape[:2]
    flat = (index + torch.arange(batch, device=index.device).unsqueeze(1) * tokens).reshape(-1)
    rows = states.reshape(flat.shape[0], *states.shape[2:])
    if valid is not None:
        chosen = valid.reshape(-1).nonzero().squeeze(1)
        flat, rows = flat[chosen], rows[chosen]
    whole = full.reshape(batch * tokens, *full.shape[2:])
    write = whole.index_copy_ if fresh else whole.index_copy
    return write(0, flat, rows.to(full.dtype)).view_as(full)


__all__ = [
    "Repacking",
    "RowGroup",
    "gather_dims",
    "gather_states",
    "group_rows",
    "repack",
    "scatter_states",
    "slots_worth_a_call",
]
