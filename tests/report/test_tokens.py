"""What token pruning leaves: numbers that can be counted by hand, and how the report says them."""

import json

import pytest
import torch

from lightning_compress.report import CompressionReport, TokenSummary
from lightning_compress.report.tokens import BINS, histogram
from lightning_compress.token_policies import KeepAll, Thresholds, TopK
from lightning_compress.tokens.costs import LayerCosts
from lightning_compress.tokens.distribution import TokenDistribution
from tests.report.test_report import report

PLAIN = LayerCosts((0.0, 0.0), (1.0, 1.0), (0.0, 0.0))  # a token costs one, in both layers


def distribution(entering: list[list[float]], real: list[float], costs: LayerCosts = PLAIN) -> TokenDistribution:
    return TokenDistribution(
        torch.tensor(entering, dtype=torch.float64), torch.tensor(real, dtype=torch.float64), costs
    )


def summary(dense: LayerCosts | None = None) -> TokenSummary:
    """Of 4 tokens one enters the second layer, of 2 both do."""
    return TokenSummary.of(distribution([[4, 2], [1, 2]], [4, 2]), Thresholds((0.5,)), dense)


def test_a_summary_counted_by_hand() -> None:
    found = summary()
    assert (found.policy, found.values, found.examples, found.tokens) == ("thresholds", (0.5,), 2, 3.0)
    assert found.macs == ((8 + 4) / 2, (5 + 4) / 2)
    assert found.macs_kept == 9 / 12
    assert found.kept_per_layer == (1.0, 3 / 6)
    assert found.quantiles == pytest.approx((0.625 + 0.05 * 0.375, 0.625 + 0.5 * 0.375, 0.625 + 0.95 * 0.375))
    assert [(n, count) for n, count in enumerate(found.histogram) if count] == [(12, 1), (19, 1)]  # 62.5 % and 100 %
    assert (found.dense_macs, found.macs_kept_overall) == (None, None)


def test_structures_and_tokens_together_are_relative_to_the_dense_layers() -> None:
    # a third layer has been removed, and tokens were three times as expensive
    found = summary(dense=LayerCosts((0.0,) * 3, (3.0,) * 3, (0.0,) * 3))
    assert found.dense_macs == (4 * 9 + 2 * 9) / 2
    assert found.macs_kept_overall == 9 / 54
    assert found.macs_kept == summary().macs_kept


@pytest.mark.parametrize(
    ("policy", "name", "values"),
    [(KeepAll(), "keep_all", ()), (TopK((0.5,)), "top_k", (0.5,)), (Thresholds((0.0,)), "thresholds", (0.0,))],
)
def test_the_policy_is_named(policy: KeepAll | TopK | Thresholds, name: str, values: tuple[float, ...]) -> None:
    found = TokenSummary.of(distribution([[2], [2]], [2]), policy)
    assert (found.policy, found.values) == (name, values)


def test_many_examples_as_a_loop_counts_them() -> None:
    costs = LayerCosts((1.0, 2.0, 0.5), (10.0, 8.0, 20.0), (0.0, 3.0, 1.0))
    real = torch.randint(1, 50, (400,)).double()
    entering = torch.stack([real, (real * torch.rand(400)).ceil(), (real * torch.rand(400)).ceil()])
    found = TokenSummary.of(TokenDistribution(entering, real, costs), KeepAll())
    shares, counts = [], [0] * BINS
    for column, n in zip(entering.T.tolist(), real.tolist(), strict=True):
        terms = list(zip(costs.a, costs.b, costs.c, column, strict=True))
        left = sum(a * k * k + b * k + c for a, b, c, k in terms)
        shares.append(left / sum(a * n * n + b * n + c for a, b, c, _ in terms))
        (place,) = (i for i in range(BINS) if i / BINS <= shares[-1] < (i + 1) / BINS or (i, shares[-1]) == (19, 1.0))
        counts[place] += 1
    assert found.histogram == tuple(counts)
    assert sum(found.histogram) == found.examples == 400
    below = [sum(share < q for share in shares) / 400 for q in found.quantiles]
    assert below == pytest.approx([0.05, 0.5, 0.95], abs=1 / 400)


def test_borders_of_the_histogram() -> None:
    assert histogram(torch.tensor([0.0, 0.249, 0.25, 0.5, 0.999, 1.0, 1.0]), bins=4) == (2, 1, 1, 3)
    assert histogram(torch.tensor([1.0])) == (0,) * 19 + (1,)


def test_an_example_without_tokens_keeps_what_it_has() -> None:
    found = TokenSummary.of(distribution([[2, 0], [1, 0]], [2, 0]), KeepAll())
    assert found.quantiles == pytest.approx((0.75 + 0.05 * 0.25, 0.875, 0.75 + 0.95 * 0.25))
    nothing = TokenSummary.of(distribution([[0], [0]], [0]), KeepAll())
    assert nothing.kept_per_layer == (1.0, 1.0)
    assert nothing.macs_kept == 1.0
    assert "100.0% of the MACs" in str(nothing)


def test_no_example_is_refused() -> None:
    with pytest.raises(ValueError, match="a distribution of at least one example for its summary, but got none"):
        TokenSummary.of(distribution([[], []], []), KeepAll())


@pytest.mark.parametrize("dense", [None, LayerCosts((0.0,) * 2, (2.0,) * 2, (0.0,) * 2)])
def test_a_report_with_tokens_survives_its_json(dense: LayerCosts | None) -> None:
    whole = report(tokens=summary(dense))
    data = json.loads(whole.to_json())
    assert CompressionReport.from_json(whole.to_json()) == whole
    assert data["tokens"]["macs_kept"] == 0.75
    assert data["tokens"]["macs_kept_overall"] == (None if dense is None else 0.375)
    assert TokenSummary.from_dict(summary(dense).to_dict()) == summary(dense)


def test_a_report_without_tokens_and_one_of_before_there_were_any() -> None:
    data = json.loads(report().to_json())
    assert data["tokens"] is None
    assert CompressionReport.from_json(json.dumps(data)) == report()
    del data["tokens"]
    assert CompressionReport.from_json(json.dumps(data)) == report()
    assert not any("token" in name for name in report().metrics())
    assert "oken" not in str(report())


def test_headline_numbers() -> None:
    dense = LayerCosts((0.0,) * 2, (2.0,) * 2, (0.0,) * 2)
    metrics = report(tokens=summary(dense)).metrics()
    assert metrics.items() >= report().metrics().items()
    assert metrics["token_pruning/macs_kept"] == 0.75
    assert metrics["token_pruning/macs_kept_overall"] == 0.375
    assert metrics["token_pruning/macs_kept_median"] == 0.8125
    assert metrics["token_pruning/macs_kept_p05"] < 0.65 < 0.98 < metrics["token_pruning/macs_kept_p95"]
    assert "token_pruning/macs_kept_overall" not in summary().metrics()


def test_the_summary_reads_as_a_table() -> None:
    text = str(summary(LayerCosts((0.0,) * 2, (2.0,) * 2, (0.0,) * 2)))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines == [
        "Tokens that stay by thresholds: 75.0% of the MACs of the layers are left, on 2 examples of 3.0 tokens without "
        "padding",
        "MACs of the layers, an example before after ratio",
        "by structures that were removed 12 6 2.00x",
        "then by tokens that leave 6 4 1.33x",
        "by both 12 4 2.67x",
        "examples 5 % median 95 %",
        "MACs left 64.4% 81.2% 98.1%",
        "layer tokens that enter thresholds",
        "1 100.0% 0.5",
        "2 50.0%",
    ]
    assert "  by tokens that leave" in str(summary()) and "structures" not in str(summary())
    indented = ["  " + line for line in text.splitlines()]
    whole = str(report(tokens=summary(LayerCosts((0.0,) * 2, (2.0,) * 2, (0.0,) * 2)))).splitlines()
    assert whole[-len(indented) - 1 : -1] == indented
