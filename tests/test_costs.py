"""Costs of units, and costs at true lengths: exact, without an assumption about what grows how."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import at_lengths, discover, kept_fraction, unit_costs
from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import Structure, Structures
from tests.hand_made import attention_structures, feed_forward_structures


class Pooled(nn.Module):
    """Self-attention (linear and quadratic in the length), then a pooler over the first position (constant)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=24, batch_first=True)
        self.pool = nn.Sequential(nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.layer(x)[:, 0])


def traced(model: nn.Module, length: int) -> Structures:
    return discover(model, (torch.randn(2, length, 16),))


def test_costs_of_one_unit_are_differences_of_the_polynomials() -> None:
    costs = unit_costs(feed_forward_structures(inputs=3, units=4, outputs=2))
    assert (costs["ffn"].macs, costs["ffn"].params) == (5.0, 6.0)  # 3 in, 2 out; and a bias
    attention = attention_structures(width=4, heads=3, dims=4)
    costs = unit_costs(attention)
    assert costs["head"].macs == attention.macs.evaluate(attention.counts) / 3
    # a channel that is both input and output of a layer: the last unit of n costs n^2 - (n - 1)^2
    square = Structures([Structure("c", "channel", 5, ())], weight_macs=Polynomial({("c", "c"): 2.0}))
    assert unit_costs(square)["c"].macs == 2 * (25 - 16)


@pytest.mark.parametrize("true", [[5], [7], [2, 2, 9, 30]])
def test_three_traced_lengths_give_the_macs_at_every_other(true: list[int]) -> None:
    model = Pooled().eval()
    here = at_lengths(traced(model, 12), {n: traced(model, n) for n in (12, 6, 3)}, true)
    there = [traced(model, n) for n in true]
    counts = {name: max(1, units // 2) for name, units in here.counts.items()}
    for at in (here.counts, counts):
        expected = sum(s.macs.evaluate(at) for s in there) / len(true)
        assert here.macs.evaluate(at) == pytest.approx(expected, rel=1e-9)
    assert here.params == there[0].params
    assert 0 < kept_fraction(here, counts, "macs") < 1


def test_the_mean_length_is_not_enough_for_attention() -> None:
    model = Pooled().eval()
    lengths = {n: traced(model, n) for n in (12, 6, 3)}
    mean = at_lengths(lengths[12], lengths, [16])
    spread = at_lengths(lengths[12], lengths, [2, 30])
    assert spread.weight_macs.evaluate(mean.counts) == pytest.approx(mean.weight_macs.evaluate(mean.counts))
    assert spread.activation_macs.evaluate(mean.counts) > 1.5 * mean.activation_macs.evaluate(mean.counts)


def test_fewer_kinds_and_proofs_are_kept() -> None:
    model = Pooled().eval()
    proven = discover(model, (torch.randn(2, 12, 16),), kinds=("head", "ffn"), prove=True)
    here = at_lengths(proven, {n: traced(model, n) for n in (12, 6, 3)}, [4])
    assert [(s.name, s.tier, s.edits) for s in here] == [(s.name, s.tier, s.edits) for s in proven]
    assert here.macs.variables <= set(proven.counts)
    assert here.pinned == proven.pinned


@pytest.mark.parametrize(
    ("lengths", "true", "message"),
    [
        ([], [3], r"Expected one to four traced lengths, positive integers, but got \[\]"),
        ([1, 2, 3, 4, 5], [3], r"but got \[1, 2, 3, 4, 5\]"),
        ([0], [3], r"positive integers, but got \[0\]"),
        ([4], [], r"Expected positive true lengths, at least one, but got \[\]"),
        ([4], [3, 0], r"Expected positive true lengths, at least one, but got \[3, 0\]"),
        ([4], [float("nan")], "Expected positive true lengths"),
    ],
    ids=str,
)
def test_lengths_that_make_no_sense(lengths: list[int], true: list[Any], message: str) -> None:
    structures = feed_forward_structures()
    with pytest.raises(ValueError, match=message):
        at_lengths(structures, dict.fromkeys(lengths, structures), true)


def test_other_structures_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"call of length 8 to have structure 'ffn' with 4 units, but it has 5: trace the same model"
    ):
        at_lengths(feed_forward_structures(units=4), {8: feed_forward_structures(units=5)}, [3])
    with pytest.raises(ValueError, match="but it has none"):
        at_lengths(feed_forward_structures(), {8: Structures()}, [3])
