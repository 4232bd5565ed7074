import warnings
from copy import deepcopy
from itertools import compress, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.analysis import discover
from lightning_compress.budget import BudgetWarning, cost_polynomial, kept_fraction, make_plan, select
from lightning_compress.importance import unit_scores
from lightning_compress.plan import PruningPlan
from lightning_compress.polynomials import Polynomial
from lightning_compress.selection import Ladder, choose_global, choose_uniform
from lightning_compress.structures import Pinned, Structure, Structures
from lightning_compress.surgery import apply_plan
from tests.hand_made import Attention, FeedForward, attention_structures, feed_forward_structures, joined


class Model(nn.Module):
    """One attention and one feed-forward part, as ``model_structures`` describes them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(width=4, heads=3, dims=4)
        self.mlp = FeedForward(inputs=4, units=24, outputs=4)


def model_structures() -> Structures:
    return joined(
        attention_structures(width=4, heads=3, dims=4, prefix="attention."),
        feed_forward_structures(inputs=4, units=24, outputs=4, prefix="mlp."),
    )


def independent(*units: int, cost: float = 1.0, kind: str = "ffn") -> Structures:
    """Structures without slices whose units cost the same and do not interact."""
    structures = [Structure(f"s{i}", kind, n, ()) for i, n in enumerate(units)]
    macs = sum((Polynomial.variable(s.name) * cost for s in structures), Polynomial())
    return Structures(structures, weight_macs=macs, params=macs + 7.0)


def counts_of(masks: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


# What is chosen


def test_the_largest_scores_stay() -> None:
    scores = {"s0": torch.tensor([5.0, 1.0, 3.0]), "s1": torch.tensor([2.0, 4.0, 0.0])}
    masks = select(independent(3, 3), scores, macs=0.5)
    assert masks["s0"].tolist() == [True, False, True]
    assert masks["s1"].tolist() == [False, True, False]


def test_scores_are_weighed_by_cost() -> None:
    # a head costs a hundred feed-forward units: its score of 50 is the first to go
    structures = Structures(
        [Structure("head", "head", 2, ()), Structure("ffn", "ffn", 200, ())],
        weight_macs=Polynomial({("head",): 100.0, ("ffn",): 1.0}),
    )
    scores = {"head": torch.tensor([50.0, 300.0]), "ffn": torch.ones(200)}
    assert counts_of(select(structures, scores, macs=0.75)) == {"head": 1, "ffn": 200}
    scores = {"head": torch.tensor([150.0, 300.0]), "ffn": torch.ones(200)}
    assert counts_of(select(structures, scores, macs=0.75)) == {"head": 2, "ffn": 100}


def test_the_cost_of_a_plan_is_that_of_products() -> None:
    # 2 of 4 heads and 2 of 4 dims are a quarter of their product; 4 of 16 more go from the feed-forward units
    structures = Structures(
        [Structure("head", "head", 4, ()), Structure("dim", "vo_dim", 4, ()), Structure("ffn", "ffn", 16, ())],
        weight_macs=Polynomial({("dim", "head"): 1.0, ("ffn",): 1.0}),
    )
    halves = torch.tensor([0.0, 0.0, 9.0, 9.0])
    scores = {"head": halves, "dim": halves, "ffn": torch.ones(16)}
    assert counts_of(select(structures, scores, macs=0.5)) == {"head": 2, "dim": 2, "ffn": 12}


def test_heads_and_their_dims_go_at_the_same_pace() -> None:
    # the score of a head is the sum over its dims and the other way round, as a norm is: both rank alike
    by_head_and_dim = torch.rand(16, 16) + 0.5
    structures = Structures(
        [Structure("head", "head", 16, ()), Structure("dim", "vo_dim", 16, ()), Structure("ffn", "ffn", 256, ())],
        weight_macs=Polynomial({("dim", "head"): 1.0, ("ffn",): 1.0}),
    )
    scores = {"head": by_head_and_dim.sum(1), "dim": by_head_and_dim.sum(0), "ffn": 2 * torch.rand(256)}
    for fraction in (0.8, 0.5, 0.2, 0.1):
        counts = counts_of(select(structures, scores, macs=fraction))
        assert abs(counts["head"] - counts["dim"]) <= 6
        assert counts["ffn"] < 256


def test_what_the_last_step_overshoots_comes_back() -> None:
    # the head is the cheapest loss and saves 10 of the 14 that must go; five units of three went before it
    structures = Structures(
        [Structure("head", "head", 2, ()), Structure("ffn", "ffn", 20, ())],
        weight_macs=Polynomial({("head",): 10.0, ("ffn",): 1.0}),
    )
    scores = {"head": torch.tensor([5.0, 99.0]), "ffn": torch.tensor([0.1] * 5 + [0.4] * 5 + [9.0] * 10)}
    masks = select(structures, scores, macs=26 / 40)
    assert counts_of(masks) == {"head": 1, "ffn": 16}
    assert masks["ffn"][4:].all()


MULTIPLES = st.sampled_from([1, 1, 2, 3])


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Ladder], Polynomial, float]:
    """Up to four structures of up to five units, with products and squares of counts in their cost."""
    names = [f"s{i}" for i in range(draw(st.integers(1, 4)))]
    ladders = []
    for name in names:
        units = draw(st.integers(1, 5))
        # never a tie: the order of equal ratios is nobody's promise
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
        scores = torch.rand(units, generator=generator, dtype=torch.float64)
        multiple = draw(MULTIPLES)
        floor = min(units, -(-draw(st.integers(1, 3)) // multiple) * multiple)
        kind = draw(st.sampled_from(["head", "ffn"]))
        ladders.append(Ladder.of(name, kind, scores, multiple, floor))
    monomials = st.lists(st.sampled_from(names), min_size=1, max_size=3).map(lambda m: tuple(sorted(m)))
    terms = draw(st.dictionaries(monomials, st.integers(1, 9), max_size=4))
    terms.update({(name,): draw(st.integers(1, 9)) for name in names})
    polynomial = Polynomial(terms)
    low = polynomial.evaluate({x.name: x.left[-1] for x in ladders})
    high = polynomial.evaluate({x.name: x.units for x in ladders})
    return ladders, polynomial, draw(st.floats(low, high))


def cost_after(ladders: list[Ladder], polynomial: Polynomial, steps: Any) -> float:
    return polynomial.evaluate({x.name: x.left[n] for x, n in zip(ladders, steps, strict=True)})


@given(problems())
def test_the_search_is_the_step_by_step_one(problem: tuple[list[Ladder], Polynomial, float]) -> None:
    """The same rule, one step at a time, with every cost computed anew."""
    ladders, polynomial, budget = problem
    full = {x.name: x.units for x in ladders}
    marginal = {n: polynomial.evaluate(full) - polynomial.evaluate({**full, n: full[n] - 1}) for n in full}
    steps = [0] * len(ladders)

    def ratio(i: int, step: int) -> float:
        return ladders[i].losses[step] / ladders[i].sizes[step] / marginal[ladders[i].name]

    def changed(i: int, way: int) -> list[int]:
        return [n + way * (i == j) for j, n in enumerate(steps)]

    while cost_after(ladders, polynomial, steps) > budget:
        steps[min((i for i, x in enumerate(ladders) if steps[i] < len(x.sizes)), key=lambda i: ratio(i, steps[i]))] += 1
    while fitting := [
        i for i, n in enumerate(steps) if n and cost_after(ladders, polynomial, changed(i, -1)) <= budget
    ]:
        steps[max(fitting, key=lambda i: ratio(i, steps[i] - 1))] -= 1
    assert choose_global(ladders, polynomial, budget, tolerance=1.0) == steps


@given(problems())
def test_a_choice_fits_and_nothing_more_would(problem: tuple[list[Ladder], Polynomial, float]) -> None:
    ladders, polynomial, budget = problem
    for choose in (choose_global, choose_uniform):
        steps = choose(ladders, polynomial, budget)
        assert cost_after(ladders, polynomial, steps) <= budget
        if choose is choose_uniform:
            continue
        for i in range(len(ladders)):
            if steps[i]:
                back = [n - (i == j) for j, n in enumerate(steps)]
                near = cost_after(ladders, polynomial, steps) >= 0.99 * budget
                assert near or cost_after(ladders, polynomial, back) > budget


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), min_size=1, max_size=3), st.floats(0.05, 1))
def test_equal_costs_give_the_best_of_all_subsets(lists: list[list[int]], fraction: float) -> None:
    structures = independent(*map(len, lists))
    scores = {s.name: torch.tensor(values, dtype=torch.float64) for s, values in zip(structures, lists, strict=True)}
    total = sum(map(len, lists))
    fraction = max(fraction, len(lists) / total)
    # per structure every subset that keeps something, as (number kept, score kept)
    subsets = [
        [(sum(mask), sum(compress(values, mask))) for mask in product((0, 1), repeat=len(values)) if any(mask)]
        for values in lists
    ]
    best = max(
        sum(score for _, score in choice)
        for choice in product(*subsets)
        if sum(number for number, _ in choice) <= fraction * total * (1 + 1e-9)
    )
    masks = select(structures, scores, macs=fraction)
    assert sum(float(scores[name][mask].sum()) for name, mask in masks.items()) == best


@pytest.mark.parametrize("metric", ["macs", "params", "units"])
@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.2])
def test_a_budget_is_met_within_one_percent(metric: Any, fraction: float) -> None:
    structures = joined(
        *(attention_structures(width=16, heads=8, dims=16, prefix=f"{i}.") for i in range(4)),
        *(feed_forward_structures(inputs=16, units=256, outputs=16, prefix=f"{i}.mlp.") for i in range(4)),
    )
    scores = {s.name: torch.rand(s.units) for s in structures}
    counts = counts_of(select(structures, scores, **{metric: fraction}))
    assert 0.99 * fraction <= kept_fraction(structures, counts, metric) <= fraction
    assert min(counts.values()) >= 1


def test_one_more_step_elsewhere_may_hit_where_the_first_choice_misses() -> None:
    structures = Structures(
        [Structure("a", "ffn", 2, ()), Structure("b", "ffn", 2, ()), Structure("c", "ffn", 2, ())],
        weight_macs=Polynomial({("a",): 6.0, ("b",): 5.0, ("c",): 4.0}),
    )
    # all of it is 30, the floors are 15; a budget of 20 can be met exactly with (1, 2, 1) alone
    scores = {"a": torch.tensor([7.0, 9.0]), "b": torch.tensor([1.0, 9.0]), "c": torch.tensor([8.0, 9.0])}
    counts = counts_of(select(structures, scores, macs=20 / 30))
    assert counts == {"a": 1, "b": 2, "c": 1}


# Floors and multiples


def test_everything_stays_at_a_fraction_of_one() -> None:
    plan = make_plan(Model(), model_structures(), macs=1.0)
    assert plan.is_empty


@pytest.mark.parametrize(
    ("min_units", "counts"),
    [
        (1, {"s0": 1, "s1": 5}),
        (2, {"s0": 2, "s1": 4}),
        ({"s0": 3}, {"s0": 3, "s1": 3}),
        ({"ffn": 2, "s0": 1}, {"s0": 1, "s1": 5}),
        ({"s1": 99}, {"s0": 1, "s1": 6}),
    ],
)
def test_floors(min_units: Any, counts: dict[str, int]) -> None:
    scores = {"s0": torch.zeros(6), "s1": torch.ones(6)}
    budget = sum(counts.values()) / 12
    assert counts_of(select(independent(6, 6), scores, units=budget, min_units=min_units)) == counts


@pytest.mark.parametrize(
    ("units", "round_to", "allowed"),
    [
        (12, 4, {4, 8, 12}),
        (10, 4, {4, 8, 10}),
        (3, 4, {3}),
        (12, {"ffn": 5}, {5, 10, 12}),
        (12, {"s0": 6, "ffn": 5}, {6, 12}),
        (12, {"head": 5}, set(range(1, 13))),
    ],
)
def test_multiples(units: int, round_to: Any, allowed: set[int]) -> None:
    seen = set()
    for fraction in torch.linspace(0.1, 1, 50).tolist():
        try:
            masks = select(
                independent(units, 40),
                {"s0": torch.rand(units), "s1": torch.rand(40)},
                macs=fraction,
                round_to=round_to,
            )
        except ValueError:
            continue
        seen.add(int(masks["s0"].sum()))
    assert seen <= allowed
    assert max(allowed) in seen
    assert len(allowed) == 1 or len(seen) > 1


def test_a_floor_is_rounded_up_to_a_multiple() -> None:
    masks = select(independent(16), {"s0": torch.rand(16)}, units=0.5, min_units=5, round_to=4)
    assert counts_of(masks) == {"s0": 8}
    with pytest.raises(ValueError, match=r"units=0\.4 lies below units=0\.5, .* min_units=5 and round_to=4"):
        select(independent(16), {"s0": torch.rand(16)}, units=0.4, min_units=5, round_to=4)


def test_the_smallest_fraction_in_the_error_can_be_reached() -> None:
    structures, scores = independent(3, 7), {"s0": torch.rand(3), "s1": torch.rand(7)}
    with pytest.raises(ValueError, match=r"macs=0\.01 lies below macs=0\.2, the smallest possible"):
        select(structures, scores, macs=0.01)
    assert counts_of(select(structures, scores, macs=0.2)) == {"s0": 1, "s1": 1}
    structures, scores = independent(7), {"s0": torch.rand(7)}
    with pytest.raises(ValueError, match=r"lies below macs=0\.1429,"):  # one of seven, rounded up
        select(structures, scores, macs=0.14)
    assert counts_of(select(structures, scores, macs=0.1429)) == {"s0": 1}


def test_what_a_cost_does_not_contain_stays() -> None:
    structures = Structures(
        [Structure("a", "ffn", 4, ()), Structure("free", "channel", 4, ())], weight_macs=Polynomial.variable("a")
    )
    masks = select(structures, {"a": torch.ones(4), "free": torch.zeros(4)}, macs=0.5)
    assert counts_of(masks) == {"a": 2, "free": 4}


# The same fraction in every structure


def test_per_layer_keeps_the_same_fraction_of_each_structure_of_a_kind() -> None:
    structures = joined(
        *(attention_structures(width=16, heads=8, dims=16, prefix=f"{i}.") for i in range(2)),
        *(feed_forward_structures(inputs=16, units=256, outputs=16, prefix=f"{i}.mlp.") for i in range(2)),
    ).of_kind("head", "ffn")
    scores = {s.name: torch.rand(s.units) * (1 + i) for i, s in enumerate(structures)}
    masks = select(structures, scores, macs=0.5, per_layer=True)
    counts = counts_of(masks)
    assert counts["0.head"] == counts["1.head"] == 4
    assert counts["0.mlp.ffn"] == counts["1.mlp.ffn"] == 128
    for name, mask in masks.items():
        assert scores[name][mask].min() >= scores[name][~mask].max()


def test_per_layer_meets_the_budget_with_the_finer_kind() -> None:
    # 3 of 8 heads are 0.375; what is left of 0.4 goes to feed-forward units
    structures = joined(
        attention_structures(width=16, heads=8, dims=16),
        feed_forward_structures(inputs=16, units=256, outputs=16),
    ).of_kind("head", "ffn")
    scores = {s.name: torch.rand(s.units) for s in structures}
    counts = counts_of(select(structures, scores, macs=0.4, per_layer=True))
    assert counts["head"] == 3
    assert counts["ffn"] > 0.4 * 256
    assert 0.99 * 0.4 <= kept_fraction(structures, counts, "macs") <= 0.4


def test_per_layer_rounds_each_structure_down() -> None:
    scores = {"s0": torch.rand(10), "s1": torch.rand(16)}
    # 8 of 10 would need a fraction of 0.8, with which 12 of 16 are too many: 4 and 12
    counts = counts_of(select(independent(10, 16), scores, units=0.7, per_layer=True, round_to=4))
    assert counts == {"s0": 4, "s1": 12}


# Plans


def test_a_plan_keeps_what_select_keeps() -> None:
    model, structures = Model(), model_structures()
    plan = make_plan(model, structures, units=0.6, round_to={"vo_dim": 2})
    plan.check(model)
    masks = select(structures, unit_scores(model, structures), units=0.6, round_to={"vo_dim": 2})
    assert plan.kept == {name: tuple(torch.nonzero(mask).flatten().tolist()) for name, mask in masks.items()}
    assert kept_fraction(structures, plan.counts, "units") == 0.6


def test_zero_units_go_first() -> None:
    model, structures = Model(), model_structures()
    with torch.no_grad():
        for unit in range(0, 24, 2):
            model.mlp.up.weight[unit] = 0
            model.mlp.up.bias[unit] = 0
            model.mlp.down.weight[:, unit] = 0
    ffn = structures.of_kind("ffn")
    assert make_plan(model, ffn, macs=0.5).kept == {"mlp.ffn": tuple(range(1, 24, 2))}


def test_importance_is_passed_on() -> None:
    model, structures = FeedForward(), feed_forward_structures()
    plan = make_plan(model, structures, units=0.5, importance=lambda m, s: torch.tensor([4.0, 1.0, 3.0, 2.0]))
    assert plan.kept == {"ffn": (0, 2)}
    assert make_plan(model, structures, units=0.5, scores={"ffn": torch.tensor([0, 5, 0, 5])}).kept == {"ffn": (1, 3)}
    model(torch.randn(5, 3)).square().sum().backward()
    assert make_plan(model, structures, units=0.5, importance="taylor").counts == {"ffn": 2}


def test_a_coarse_grid_is_said() -> None:
    model, structures = FeedForward(), feed_forward_structures()
    with pytest.warns(
        BudgetWarning, match=r"macs=0\.6 of the prunable part, but the plan keeps 0\.5000: .* 1 unit\(s\) of 'ffn'"
    ):
        plan = make_plan(model, structures, macs=0.6)
    assert plan.counts == {"ffn": 2}
    with pytest.warns(
        BudgetWarning, match=r"in every structure of a kind \(per_layer\), .* 1 unit\(s\) of 'ffn', 0\.2500"
    ):
        make_plan(model, structures, macs=0.6, per_layer=True)
    with pytest.warns(BudgetWarning, match=r"smallest step left is 2 unit\(s\)"):
        make_plan(model, structures, macs=0.9, round_to=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(structures, {"ffn": torch.ones(4)}, macs=0.6)


# Costs


def test_kept_fraction_is_of_the_prunable_part() -> None:
    structures = feed_forward_structures(inputs=3, units=4, outputs=2)
    assert kept_fraction(structures, {"ffn": 1}, "params") == 0.25  # the bias of the output is in neither side
    assert kept_fraction(structures, {"ffn": 1}, "macs") == 0.25
    assert kept_fraction(structures, {}, "units") == 1.0
    attention = attention_structures(heads=3, dims=4)
    assert kept_fraction(attention, {"head": 1}, "macs") == pytest.approx(1 / 3)
    assert kept_fraction(attention, {"head": 1, "qk_dim": 2, "vo_dim": 2}, "macs") == pytest.approx(1 / 6)
    assert kept_fraction(attention, {"head": 1}, "units") == (1 + 4 + 4) / (3 + 4 + 4)


def test_the_cost_polynomial_is_the_prunable_part() -> None:
    structures = feed_forward_structures(inputs=3, units=4, outputs=2)
    assert cost_polynomial(structures, "params") == Polynomial({("ffn",): 6.0})
    assert cost_polynomial(structures, "units") == Polynomial({("ffn",): 1.0})


def test_unknown_metrics_and_names_are_refused() -> None:
    structures = feed_forward_structures()
    with pytest.raises(ValueError, match=r"metric to be one of \('params', 'macs', 'units'\), but got 'flops'"):
        kept_fraction(structures, {}, "flops")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"among \['ffn'\], but got 'fnn'\. Did you mean 'ffn'\?"):
        kept_fraction(structures, {"fnn": 1}, "macs")


# What is refused


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "exactly one target among params, macs and units, but got none"),
        ({"macs": 0.5, "params": 0.5}, r"exactly one target .* but got params=0\.5, macs=0\.5"),
        ({"macs": 0.0}, r"macs to be a kept fraction in \(0, 1\], but got 0\.0\."),
        ({"macs": 1.5}, r"macs to be a kept fraction in \(0, 1\], but got 1\.5\."),
        ({"params": -0.1}, r"params to be a kept fraction in \(0, 1\], but got -0\.1\."),
        ({"units": 40}, r"units to be a kept fraction in \(0, 1\], but got 40\. Did you mean units=0\.4\?"),
        ({"macs": float("nan")}, r"macs to be a kept fraction in \(0, 1\], but got nan"),
        ({"macs": True}, "macs to be a kept fraction .* but got True"),
        ({"macs": "0.5"}, "macs to be a kept fraction .* but got '0.5'"),
        ({"macs": 0.5, "round_to": 0}, "round_to to be an integer of at least 1, but got 0"),
        ({"macs": 0.5, "round_to": {"ffn": 2.0}}, r"round_to\['ffn'\] to be an integer of at least 1, but got 2\.0"),
        ({"macs": 0.5, "min_units": True}, "min_units to be an integer of at least 1, but got True"),
        ({"macs": 0.5, "min_units": {"heads": 2}}, r"min_units to be kinds .* but got 'heads'\. Did you mean 'head'\?"),
    ],
)
def test_malformed_requests_are_refused(target: dict[str, Any], message: str) -> None:
    model, structures = FeedForward(), feed_forward_structures()
    with pytest.raises(ValueError, match=message):
        make_plan(model, structures, **target)
    with pytest.raises(ValueError, match=message):
        select(structures, {"ffn": torch.ones(4)}, **target)


def test_a_plain_list_has_no_costs() -> None:
    with pytest.raises(ValueError, match=r"structures as discovery returns them .* but got list\. Pass what discover"):
        make_plan(FeedForward(), list(feed_forward_structures()), macs=0.5)  # type: ignore[arg-type]


def test_nothing_prunable_lists_what_was_pinned_and_why() -> None:
    pinned = [Pinned("encoder.ffn", "ffn", 64, ("up.weight",), ("aten.foo at encoder.up has no rule",))]
    with pytest.raises(
        ValueError,
        match=r"lowers the macs, but there are no structures\.\nWhat was pinned, and why:\n"
        r"  encoder\.ffn \(ffn, 64 units\): aten\.foo at encoder\.up has no rule",
    ):
        make_plan(FeedForward(), Structures(pinned=pinned), macs=0.5)
    with pytest.raises(ValueError, match="No family of units was pinned either"):
        make_plan(FeedForward(), Structures(), macs=0.5)
    with pytest.raises(ValueError, match="lowers the macs, but the structures cost nothing"):
        select(Structures([Structure("a", "ffn", 2, ())]), {"a": torch.ones(2)}, macs=0.5)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "Expected scores for structure 'ffn', but got none"),
        ({"ffn": torch.ones(3)}, r"shape \(4,\) for structure 'ffn', but got shape \(3,\)"),
        (
            {"ffn": torch.tensor([1.0, -1.0, 0.0, 0.0])},
            "finite, non-negative scores for structure 'ffn', but got -1 to 1",
        ),
        ({"ffn": torch.full((4,), float("nan"))}, "finite, non-negative scores for structure 'ffn', but got nan"),
    ],
)
def test_malformed_scores_are_refused(scores: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(FeedForward(), feed_forward_structures(), macs=0.5, scores=scores)


def test_forty_thousand_units_are_chosen() -> None:
    structures = independent(*(4000,) * 10, cost=3.0)
    scores = {s.name: torch.rand(s.units) for s in structures}
    masks = select(structures, scores, macs=0.3)
    assert sum(counts_of(masks).values()) == 12_000
    threshold = torch.cat(list(scores.values())).sort(descending=True).values[11_999]
    assert all(torch.equal(mask, scores[name] >= threshold) for name, mask in masks.items())


def test_the_ladder_of_a_structure() -> None:
    ladder = Ladder.of("a", "ffn", torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]), multiple=2, floor=2)
    assert ladder.left == (5, 4, 2)
    assert ladder.sizes == (1, 2)
    assert ladder.losses == (1.0, 5.0)
    assert [ladder.kept_mask(n).tolist() for n in range(3)] == [
        [True] * 5,
        [True, False, True, True, True],
        [False, False, False, True, True],
    ]
    assert Ladder.of("a", "ffn", torch.ones(3), multiple=1, floor=3).left == (3,)


# With discovery


def test_plans_of_discovered_structures_meet_their_budgets() -> None:
    layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=512, batch_first=True).eval()
    structures = discover(layer, (torch.randn(2, 6, 32),))
    for metric in ("macs", "params"):
        for fraction in (0.7, 0.3):
            plan = make_plan(layer, structures, **{metric: fraction})  # type: ignore[arg-type]
            assert 0.99 * fraction <= kept_fraction(structures, plan.counts, metric) <= fraction  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [0.6, 0.3])
def test_two_rounds_are_their_composition(first: float) -> None:
    """Remove, discover costs anew by ``shrunk``, remove again: parameters are those that the composed plan promises."""
    model = nn.Sequential(nn.Linear(6, 200), nn.GELU(), nn.Linear(200, 150), nn.GELU(), nn.Linear(150, 3)).double()
    batch = torch.randn(4, 6, dtype=torch.float64)
    structures = discover(model, (batch,))
    dense = deepcopy(model)
    one = make_plan(model, structures, params=first)
    apply_plan(model, one, verify=((batch,), {}))
    two = make_plan(model, one.shrunk(structures), params=0.5)
    apply_plan(model, two, verify=((batch,), {}))
    both = one.compose(two)
    apply_plan(dense, PruningPlan.from_json(both.to_json()), verify=((batch,), {}))
    assert torch.equal(dense(batch), model(batch))
    promised = structures.params.evaluate(both.counts)
    assert promised == sum(p.numel() for p in model.parameters())
    assert kept_fraction(structures, both.counts, "params") == pytest.approx(first * 0.5, rel=0.02)


def test_the_floor_of_a_structure_holds() -> None:
    structures = Structures([Structure("a", "ffn", 8, (), floor=3)], weight_macs=Polynomial.variable("a"))
    with pytest.raises(ValueError, match=r"macs=0\.25 lies below macs=0\.375"):
        select(structures, {"a": torch.ones(8)}, macs=0.25)
