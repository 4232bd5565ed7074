"""Small models with structures written by hand, so that tests of plans, scores and budgets need no discovery.

FeedForward   up (4 units x 3) -> relu -> gates -> down (2 x 4 units)
Attention     q, k (heads * qk dims), v (heads * vo dims), o; a grid: heads and dims share every axis
"""

import torch
from torch import Tensor, nn

from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import AttributeEdit, Pinned, Slice, Structure, Structures


class FeedForward(nn.Module):
    """Two linear layers; ``gates`` multiply the units between them."""

    def __init__(self, inputs: int = 3, units: int = 4, outputs: int = 2) -> None:
        super().__init__()
        self.up = nn.Linear(inputs, units)
        self.down = nn.Linear(units, outputs)

    def forward(self, x: Tensor, gates: Tensor | float = 1.0) -> Tensor:
        return self.down(torch.relu(self.up(x)) * gates)


class Attention(nn.Module):
    """The projections of an attention layer with ``heads`` heads of ``dims`` Q/K and V/O dims."""

    def __init__(self, width: int = 4, heads: int = 3, dims: int = 4) -> None:
        super().__init__()
        self.q = nn.Linear(width, heads * dims)
        self.k = nn.Linear(width, heads * dims)
        self.v = nn.Linear(width, heads * dims)
        self.o = nn.Linear(heads * dims, width)
        self.heads = heads


def grid(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Positions row * columns + column: the table of the rows, (rows, columns), and that of the columns."""
    table = torch.arange(rows * columns).reshape(rows, columns)
    return table, table.t().contiguous()


def pieces(layer: str, axis: int, table: Tensor, zero: bool = False, size: int | None = None) -> tuple[Slice, ...]:
    """Slices of a linear layer: weight rows and bias (axis 0), or weight columns (axis 1)."""
    size = table.numel() if size is None else size
    role = "consumer" if axis == 1 else "producer"
    weight = Slice(f"{layer}.weight", axis, size, table, role, zero)
    return (weight,) if axis == 1 else (weight, Slice(f"{layer}.bias", 0, size, table, role, zero))


def feed_forward_structures(inputs: int = 3, units: int = 4, outputs: int = 2, prefix: str = "") -> Structures:
    """The units of a FeedForward at ``prefix``, with MACs and parameters for one row of input."""
    table = torch.arange(units).unsqueeze(1)
    name = f"{prefix}ffn"
    kept = Polynomial.variable(name)
    structure = Structure(
        name,
        "ffn",
        units,
        (*pieces(f"{prefix}up", 0, table), *pieces(f"{prefix}down", 1, table, zero=True)),
        sizes=(kept,),
        edits=(AttributeEdit(f"{prefix}up", "out_features", kept), AttributeEdit(f"{prefix}down", "in_features", kept)),
    )
    return Structures(
        [structure],
        weight_macs=kept * (inputs + outputs),
        params=kept * (inputs + 1 + outputs) + outputs,
        pinned=[Pinned("input", "unknown", inputs, (f"{prefix}up.weight",), ("the input of the model",))],
    )


def attention_structures(
    width: int = 4, heads: int = 3, dims: int = 4, tokens: int = 5, prefix: str = ""
) -> Structures:
    """Heads, Q/K dims and V/O dims of an Attention at ``prefix``, with the costs of ``tokens`` tokens."""
    by_head, by_dim = grid(heads, dims)
    p = prefix

    def qk(table: Tensor) -> tuple[Slice, ...]:
        return (*pieces(f"{p}q", 0, table), *pieces(f"{p}k", 0, table, zero=True))

    def vo(table: Tensor, zero: bool = True) -> tuple[Slice, ...]:
        return (*pieces(f"{p}v", 0, table), *pieces(f"{p}o", 1, table, zero=zero))

    h, q, v = (Polynomial.variable(f"{p}{kind}") for kind in ("head", "qk_dim", "vo_dim"))
    heads_ = Structure(
        f"{p}head",
        "head",
        heads,
        # a head is silenced at the output projection alone
        (*pieces(f"{p}q", 0, by_head), *pieces(f"{p}k", 0, by_head), *vo(by_head)),
        sizes=(h, h * q, h * v),
        edits=(AttributeEdit(p.rstrip("."), "heads", h),),
    )
    qk_dims = Structure(f"{p}qk_dim", "qk_dim", dims, qk(by_dim))
    vo_dims = Structure(f"{p}vo_dim", "vo_dim", dims, vo(by_dim))
    return Structures(
        [heads_, qk_dims, vo_dims],
        weight_macs=h * q * (2 * tokens * width) + h * v * (2 * tokens * width),
        activation_macs=h * q * tokens**2 + h * v * tokens**2,
        params=h * q * (2 * width + 2) + h * v * (2 * width + 1) + width,
    )


def joined(*parts: Structures) -> Structures:
    """Structures of several modules as those of one model."""
    zero = Polynomial()
    return Structures(
        [structure for part in parts for structure in part],
        weight_macs=sum((part.weight_macs for part in parts), zero),
        activation_macs=sum((part.activation_macs for part in parts), zero),
        params=sum((part.params for part in parts), zero),
        pinned=[family for part in parts for family in part.pinned],
    )
