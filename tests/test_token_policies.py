"""Decisions against a plain loop over tokens; the JSON form there and back, and what it refuses."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.token_policies import KeepAll, Thresholds, TokenPolicy, TopK, policy_from, spatten_rates


def by_loop(policy: TokenPolicy, layer, scores, active, real, protected, min_keep):
    """The definition, example by example."""
    rows = []
    for i in range(len(scores)):
        there = [t for t in range(scores.shape[1]) if active[i, t]]
        safe = {t for t in there if protected is not None and protected[i, t]}
        best = sorted(there, key=lambda t: (-scores[i, t].item(), t))
        if isinstance(policy, Thresholds):
            kept = safe | {t for t in there if scores[i, t] >= policy.values[layer]}
            for t in best:
                if len(kept) >= min_keep:
                    break
                kept.add(t)
        elif isinstance(policy, TopK):
            number = max(min_keep, round((real[i] * policy.rates[layer]).item()))
            kept = safe | set([*sorted(safe), *(t for t in best if t not in safe)][:number])
        else:
            kept = set(there)
        rows.append([t in kept for t in range(scores.shape[1])])
    return torch.tensor(rows, dtype=torch.bool).reshape(scores.shape)


@st.composite
def questions(draw):
    batch, tokens = draw(st.integers(0, 4)), draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    # few levels, so that there are many ties
    scores = torch.randint(0, 5, (batch, tokens), generator=generator) / 2
    active = torch.rand(batch, tokens, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    real = active.sum(1) + torch.randint(0, 3, (batch,), generator=generator)
    protected = torch.rand(batch, tokens, generator=generator) < 0.2 if draw(st.booleans()) else None
    number = draw(st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0]))
    policy = draw(st.sampled_from([Thresholds((9.0, number * 2.5)), TopK((0.9, number)), TopK((1.0, number), True)]))
    return policy, draw(st.integers(0, 1)), scores, active, real, protected, draw(st.integers(1, 4))


@settings(deadline=None, max_examples=400)
@given(questions())
def test_decisions_are_those_of_the_definition(question):
    policy, _, scores, active, _, protected, min_keep = question
    kept = policy.keep(*question[1:])
    assert kept.dtype == torch.bool and kept.shape == scores.shape
    assert not (kept & ~active).any()
    assert (kept.sum(1) >= active.sum(1).clamp(max=min_keep)).all()
    if protected is not None:
        assert (kept | ~(active & protected)).all()
    assert kept.tolist() == by_loop(*question).tolist()


@settings(deadline=None, max_examples=50)
@given(questions())
def test_the_order_of_the_examples_does_not_matter_and_inactive_tokens_neither(question):
    policy, layer, scores, active, real, protected, min_keep = question
    kept = policy.keep(*question[1:])
    back = policy.keep(
        layer,
        scores.flip(0).masked_fill(~active.flip(0), 100.0),
        active.flip(0),
        real.flip(0),
        None if protected is None else protected.flip(0),
        min_keep,
    )
    assert back.flip(0).tolist() == kept.tolist()


def ask(policy, layer=0, min_keep=1, protected=None, scores=((0.5, 2.0, 1.0, 0.5),), active=None, real=None):
    scores = torch.tensor(scores)
    active = torch.ones_like(scores, dtype=torch.bool) if active is None else active
    real = active.sum(-1) if real is None else real
    return policy.keep(layer, scores, active, real, protected, min_keep).int().tolist()


def test_a_score_at_the_threshold_stays():
    policy = Thresholds((0.0, 1.0, 1.5, 9.0))
    assert [ask(policy, layer) for layer in range(4)] == [
        [[1, 1, 1, 1]],
        [[0, 1, 1, 0]],
        [[0, 1, 0, 0]],
        [[0, 1, 0, 0]],
    ]
    assert ask(policy, 3, min_keep=3) == [[1, 1, 1, 0]]
    assert ask(policy, 3, min_keep=9) == [[1, 1, 1, 1]]
    assert ask(policy, 3, protected=torch.tensor([[True, False, False, False]])) == [[1, 0, 0, 0]]


def test_a_rate_is_of_the_tokens_at_the_start():
    active = torch.tensor([[True, True, False, True]])
    assert ask(TopK((0.5,)), active=active, real=torch.tensor([4])) == [[1, 1, 0, 0]]
    assert ask(TopK((0.25,)), active=active, real=torch.tensor([4])) == [[0, 1, 0, 0]]
    assert ask(TopK((0.25,)), protected=torch.tensor([[True, False, False, True]])) == [[1, 0, 0, 1]]
    assert ask(TopK((0.75,)), protected=torch.tensor([[False, False, False, True]])) == [[0, 1, 1, 1]]


def test_half_precision_and_short_rows():
    for policy in (Thresholds((1.0,)), TopK((0.5,)), KeepAll()):
        for dtype in (torch.float16, torch.bfloat16):
            scores, active = torch.ones(2, 1, dtype=dtype), torch.tensor([[True], [False]])
            kept = policy.keep(0, scores, active, torch.tensor([1, 0]), None, 1)
            assert kept.tolist() == [[True], [False]]


def test_keeping_all_knows_any_layer():
    policy = KeepAll()
    assert (policy.layers, policy.accumulated) == (None, False)
    assert ask(policy, 77) == [[1, 1, 1, 1]]


def test_layers_and_the_wish_for_summed_scores():
    policies: list[TokenPolicy] = [Thresholds((1.0, 2.0)), TopK((1.0,)), TopK((1.0, 0.5, 0.2), accumulated=True)]
    assert [(p.layers, p.accumulated) for p in policies] == [(2, False), (1, False), (3, True)]


@pytest.mark.parametrize(
    "policy", [KeepAll(), Thresholds((0.0, -0.25, 1e-30, 1 / 3)), TopK((1.0, 0.1), True), TopK((1,))]
)
def test_json_there_and_back(policy):
    assert policy_from(json.loads(json.dumps(policy.state()))) == policy


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "expected policy to be an object, but got None"),
        ({}, r"expected policy.kind to be a string, but got None"),
        ({"kind": "best"}, r"expected policy.kind to be one of .*'top_k'.*, but got 'best'"),
        (
            {"kind": "keep_all", "values": []},
            r"expected policy to have the keys \['kind'\], .* \['values'\] are unknown",
        ),
        ({"kind": "thresholds"}, r"\['among_rest', 'values'\] are missing"),
        (
            {"kind": "thresholds", "values": [1.0], "among_rest": 1},
            r"expected policy.among_rest to be true or false, but got 1",
        ),
        (
            {"kind": "thresholds", "values": 1.0, "among_rest": False},
            r"expected policy.values to be a list, but got 1.0",
        ),
        (
            {"kind": "thresholds", "values": [], "among_rest": False},
            r"expected policy.values to be a list of 1 to 100000 numbers, but got \[\]",
        ),
        (
            {"kind": "thresholds", "values": [1, "2"], "among_rest": False},
            r"expected policy.values\[1\] to be a number .*, but got '2'",
        ),
        (
            {"kind": "thresholds", "values": [True], "among_rest": False},
            r"expected policy.values\[0\] to be a number .*, but got True",
        ),
        (
            {"kind": "thresholds", "values": [math.nan], "among_rest": False},
            r"policy.values\[0\] to be a number .*, but got nan",
        ),
        (
            {"kind": "thresholds", "values": [math.inf], "among_rest": False},
            r"policy.values\[0\] to be a finite number, but got inf",
        ),
        (
            {"kind": "thresholds", "values": [10**400], "among_rest": False},
            r"policy.values\[0\] to be a finite number, but got 1000",
        ),
        (
            {"kind": "top_k", "rates": [1.5], "accumulated": False},
            r"rates\[0\] to be a number from 0 to 1, but got 1.5",
        ),
        ({"kind": "top_k", "rates": [0.5], "accumulated": 1}, r"policy.accumulated to be true or false, but got 1"),
    ],
)
def test_json_that_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        policy_from(state)


def test_messages_name_the_place_in_the_file():
    with pytest.raises(ValueError, match=r"expected tokens\.policy\.kind to be a string"):
        policy_from({}, "tokens.policy")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Thresholds(()), r"Expected thresholds of at least one layer, finite numbers, but got \(\)"),
        (lambda: Thresholds((1.0, math.nan)), r"finite numbers, but got \(1.0, nan\)"),
        (lambda: TopK((1.2,)), r"Expected rates of at least one layer, numbers from 0 to 1, but got \(1.2,\)"),
        (lambda: ask(Thresholds((1.0, 2.0)), 2), "Expected a layer from 0 to 1, but got 2"),
        (lambda: ask(KeepAll(), -1), "Expected a layer from 0, but got -1"),
        (lambda: ask(TopK((1.0,)), min_keep=0), "Expected min_keep of at least 1, but got 0"),
        (lambda: ask(KeepAll(), scores=(1.0, 2.0)), r"Expected scores of shape \(batch, tokens\), but got \(2,\)"),
        (lambda: ask(TopK((1.0,)), active=torch.ones(1, 4)), r"active as bool .*\(1, 4\), but got torch.float32"),
        (lambda: ask(KeepAll(), protected=torch.ones(1, 3).bool()), r"protected as bool .* of shape \(1, 3\)"),
        (lambda: ask(KeepAll(), real=torch.tensor([1, 2])), r"real tokens of every example, \(1,\), but got \(2,\)"),
        (lambda: spatten_rates(0.5, 0), "number of layers of at least 1, but got 0"),
        (lambda: spatten_rates(1.1, 3), "final rate of at most 1, but got 1.1"),
        (lambda: spatten_rates(math.nan, 3), "final rate of at most 1, but got nan"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rates_begin_whole_and_end_at_the_final_one():
    assert spatten_rates(0.1, 12) == pytest.approx([1, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert spatten_rates(0.3, 24)[:5] == pytest.approx([1, 1, 1, 1, 0.965])
    assert spatten_rates(0.3, 2) == (1.0, 1.0)
    assert spatten_rates(-1.0, 7) == (1.0, 1.0, 1.0, 0.5, 0.01, 0.01, 0.01)


def test_thresholds_among_the_rest_are_those_of_relative_scores() -> None:
    scores = torch.tensor([[4.0, 0.2, 3.0, 0.1, 0.3], [1.0, 0.8, 1.6, 0.4, 1.2]])
    active = torch.ones(2, 5, dtype=torch.bool)
    protected = torch.zeros(2, 5, dtype=torch.bool)
    protected[:, 0] = True
    policy = Thresholds((0.9,), among_rest=True)
    stays = policy.keep(0, scores, active, torch.tensor([5, 5]), protected, 1)
    assert stays.tolist() == [[True, True, True, False, True]] * 2  # what the third takes does not matter
    assert Thresholds((0.9,)).keep(0, scores, active, torch.tensor([5, 5]), protected, 1).sum(1).tolist() == [2, 3]
    assert policy_from(policy.state()) == policy
