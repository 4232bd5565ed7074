"""Experts of a mixture: found, masked == removed, carried out, priced, refused."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import (
    PruningPlan,
    SurgeryError,
    apply_plan,
    discover,
    kept_fraction,
    make_plan,
    silence_units,
    unit_scores,
    zero_units,
)
from lightning_compress.structures import AttributeEdit
from lightning_compress.surgery.modules import GappedList
from tests.surgery.state_of import state_of
from tests.test_theorem import call, double, error, other_batch, step
from tests.zoo import CAUSAL_CALL, DECODER, _transformers

WIDTH, FFN, EXPERTS, CHOSEN = 6, 7, 5, 2
EXACT = 1e-10
X = torch.randn(3, 8, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
OTHER = torch.randn(2, 11, WIDTH, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class ListMixture(nn.Module):
    """A list of expert modules, a linear router, the weights of the chosen ones made to sum to one."""

    def __init__(self, chosen: int = CHOSEN) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def scores(self, x: Tensor) -> Tensor:
        return self.router(x)

    def forward(self, x: Tensor) -> Tensor:
        weights, places = self.scores(x).softmax(-1).topk(self.chosen, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for number in range(len(self.experts)):
            weight = (weights * (places == number)).sum(-1, keepdim=True)
            y = y + weight * self.experts[number](x)
        return y


class StackedMixture(ListMixture):
    """One tensor for all experts; their number is an attribute; scores by a sigmoid, with a correction that only
    decides who is chosen.
    """

    def __init__(self, chosen: int = CHOSEN) -> None:
        super().__init__(chosen)
        self.number = EXPERTS
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.register_buffer("correction", torch.linspace(-0.1, 0.1, EXPERTS))
        del self.experts
        self.up, self.down = (
            nn.Parameter(torch.randn(EXPERTS, WIDTH, FFN)),
            nn.Parameter(torch.randn(EXPERTS, FFN, WIDTH)),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits = self.scores(x)
        places = (logits + self.correction).topk(self.chosen, -1).indices
        weights = logits.gather(-1, places).sigmoid()
        hot = F.one_hot(places, self.number).to(x.dtype)  # (batch, tokens, chosen, experts)
        y = torch.zeros_like(x)
        for number in range(self.number):
            weight = (weights * hot[..., number]).sum(-1, keepdim=True)
            y = y + weight * (F.gelu(x @ self.up[number]) @ self.down[number])
        return y


class Free(ListMixture):
    """Uses the weight of a router that is never called."""

    def scores(self, x: Tensor) -> Tensor:
        return F.linear(x, self.router.weight, self.router.bias)


class Net(nn.Module):
    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.first, self.mixture, self.last = nn.Linear(WIDTH, WIDTH), mixture, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.mixture(x))


@pytest.mark.parametrize("kind", [ListMixture, StackedMixture])
def test_masked_equals_removed(kind: type[nn.Module]) -> None:
    dense = Net(kind()).double()
    optimizer = torch.optim.Adam(dense.parameters(), lr=1e-2)
    step(dense, optimizer, (X,), {})
    structures = discover(dense, (X,), kinds=("expert", "ffn"), prove=True)
    mixture = structures["mixture.expert"]
    assert (mixture.kind, mixture.units, mixture.floor, mixture.tier) == ("expert", EXPERTS, CHOSEN, "native")
    assert len(mixture.members) == (EXPERTS if kind is ListMixture else 0)
    widths = {s.name: range(0, s.units, 2) for s in structures if s.kind == "ffn"}
    plan = PruningPlan.of(dense, structures, {**widths, "mixture.expert": [0, 2, 3]})
    small, small_optimizer = copy.deepcopy((dense, optimizer))
    report = apply_plan(small, plan, [small_optimizer], ((X,), {}))
    assert report.error is not None and report.error < EXACT
    assert structures.params.evaluate(report.plan.counts) == pytest.approx(sum(p.numel() for p in small.parameters()))
    if kind is ListMixture:
        assert isinstance(small.mixture.experts, GappedList) and list(small.mixture.experts._modules) == ["0", "2", "3"]
    else:
        assert small.mixture.number == 3 and small.mixture.correction.shape == (3,)
    assert small.mixture.router.out_features == 3

    before = dense(X)
    with silence_units(dense, plan):
        assert error([dense(X)], [before]) > 1e-6
        for x in (X, OTHER):
            assert error([small(x)], [dense(x)]) < EXACT
        masks = {name: torch.ones_like(t) for name, t in dense.named_parameters()}
        for (name, axis), positions in plan.removed_positions().items():
            if name in masks:
                masks[name].index_fill_(axis, positions, 0)
        names = {id(p): n for n, p in dense.named_parameters()}
        for parameter, state in optimizer.state.items():
            state["exp_avg"].mul_(masks[names[id(parameter)]])
        step(dense, optimizer, (X,), {}, masks)
        step(small, small_optimizer, (X,), {})
        assert error([small(X)], [dense(X)]) < EXACT

    replay = Net(kind()).double()
    apply_plan(replay, PruningPlan.from_json(report.plan.to_json()))
    replay.load_state_dict(small.state_dict())
    assert torch.equal(replay(X), small(X))
    with pytest.raises(ValueError, match="already applied"):
        apply_plan(replay, report.plan)

    left = report.plan.shrunk(structures)
    assert left["mixture.expert"].members == tuple(mixture.members[u] for u in (0, 2, 3) if mixture.members)
    later = PruningPlan.of(small, left, {"mixture.expert": [1, 2]})
    apply_plan(small, later, verify=((X,), {}))
    twice = report.plan.compose(later)
    assert twice.kept["mixture.expert"] == (2, 3)
    again = copy.deepcopy(replay)
    apply_plan(again, later, verify=((X,), {}))
    assert sum(p.numel() for p in again.parameters()) == pytest.approx(structures.params.evaluate(twice.counts))


@pytest.mark.parametrize("kind", [ListMixture, StackedMixture])
def test_costs_of_experts(kind: type[nn.Module]) -> None:
    """Parameters of the experts and the router fall; of the work only that of the router where experts are chosen."""
    model = Net(kind()).double()
    structures = discover(model, (X,), kinds="expert", prove=True)
    total = sum(p.numel() for p in model.parameters())
    assert structures.params.evaluate(structures.counts) == pytest.approx(total)
    one = {"mixture.expert": EXPERTS - 1}
    per_expert = (WIDTH + (kind is ListMixture)) + (WIDTH * FFN * 2 + (FFN + WIDTH if kind is ListMixture else 0))
    assert structures.params.evaluate(one) == pytest.approx(total - per_expert)
    assert structures.macs.evaluate(structures.counts) - structures.macs.evaluate(one) == 3 * 8 * WIDTH
    assert kept_fraction(structures, {"mixture.expert": 3}, "params") == pytest.approx(3 / 5)
    plan = make_plan(model, structures, params=0.4)
    assert plan.counts == {"mixture.expert": CHOSEN}
    with pytest.raises(ValueError, match="smallest possible"):  # as many as are chosen stay
        make_plan(model, structures, params=0.2)
    with pytest.raises(ValueError, match="to keep at least 2 of its 5 units"):
        PruningPlan.of(model, structures, {"mixture.expert": [1]})


def test_scores_of_experts() -> None:
    model = Net(ListMixture()).double()
    structures = discover(model, (X,), kinds="expert")
    with torch.no_grad():
        for p in (*model.mixture.experts[3].parameters(), model.mixture.router.weight[3]):
            p.mul_(1e-3)
    assert int(unit_scores(model, structures)["mixture.expert"].argmin()) == 3
    model(X).square().sum().backward()
    taylor = unit_scores(model, structures, "taylor")["mixture.expert"]
    gates = [
        sum(float((p.detach() * p.grad).sum()) for p in expert.parameters()) ** 2 for expert in model.mixture.experts
    ]
    assert torch.allclose(taylor, torch.tensor(gates, dtype=torch.float64), rtol=1e-5)
    stacked = Net(StackedMixture()).double()
    stacked(X).square().sum().backward()
    structure = discover(stacked, (X,), kinds="expert")
    taylor = unit_scores(stacked, structure, "taylor")["mixture.expert"]
    up, down = stacked.mixture.up, stacked.mixture.down
    expected = ((up * up.grad).sum((1, 2)) + (down * down.grad).sum((1, 2))).square()
    assert torch.allclose(taylor, expected.detach(), rtol=1e-5)


def test_mixtures_that_stay_whole() -> None:
    all_chosen = discover(Net(ListMixture(EXPERTS)).double(), (X,), kinds="expert", prove=True)
    assert not len(all_chosen)
    assert [p.reasons for p in all_chosen.pinned if p.kind == "expert"] == [("all of its 5 experts are chosen",)]
    free = discover(Net(Free()).double(), (X,), kinds="expert", prove=True)
    assert not len(free)
    (reason,) = [p.reasons[0] for p in free.pinned if p.kind == "expert"]
    assert "the outputs differ by" in reason


def test_a_choice_among_other_things_is_no_mixture() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, 9), nn.Linear(9, EXPERTS)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.first(x))).topk(2, -1).values

    structures = discover(Classes().double(), (X,), kinds="expert")
    assert not len(structures) and not [p for p in structures.pinned if p.kind == "expert"]


def test_a_mask_that_cannot_work_says_so() -> None:
    model = Net(ListMixture()).double()
    structures = discover(model, (X,), kinds="expert", prove=True)
    plan = PruningPlan.of(model, structures, {"mixture.expert": [0, 1, 2]})
    before = state_of(model)
    with pytest.raises(SurgeryError, match=r"'mixture\.expert' \(expert\) also need a mask"):
        zero_units(model, plan)
    with silence_units(model, plan):
        model.mixture.router.forward = lambda x: x[..., :EXPERTS]
        with pytest.raises(RuntimeError, match="to make the scores of its experts with 'weight'"):
            model(X)
        del model.mixture.router.forward
        model(X)
    assert state_of(model) == before


MOE: dict[str, Any] = {**DECODER, "intermediate_size": 72, "moe_intermediate_size": 72, "num_experts_per_tok": 2}
FAMILIES: dict[str, Any] = {
    "Mixtral": ("Mixtral", {"num_local_experts": 6}),
    "Qwen2-MoE": ("Qwen2Moe", {"num_experts": 6, "shared_expert_intermediate_size": 40}),
    "gpt-oss": ("GptOss", {"num_local_experts": 6, "head_dim": 16, "layer_types": ["full_attention"] * 2}),
    "JetMoE": ("JetMoe", {"num_local_experts": 6, "kv_channels": 16}),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_masked_equals_removed_in_families(name: str) -> None:
    """Experts, heads and a layer at the same time; experts one by one, since float64 has no grouped product."""
    family, options = FAMILIES[name]
    settings = {**MOE, **options, "experts_implementation": "eager"}
    example = _transformers(f"{family}ForCausalLM", f"{family}Config", CAUSAL_CALL, **settings)
    model = example.model().double()
    kwargs = double(example.kwargs or {})
    structures = discover(model, (), kwargs, kinds=("expert", "head", "layer"), prove=True)
    mixtures = [s for s in structures if s.kind == "expert"]
    assert len(mixtures) == (4 if name == "JetMoE" else 2)
    counters = {e.attribute for s in mixtures for e in s.edits if isinstance(e, AttributeEdit)}
    assert "num_experts" in counters
    kept = {s.name: [0, 2, 3, 5] for s in mixtures} | {s.name: [1] for s in structures if s.kind == "head"}
    layer = next(s.name for s in structures if s.kind == "layer")
    for extra in ({}, {layer: []}):
        plan = PruningPlan.of(model, structures, {**kept, **extra})
        small = copy.deepcopy(model)
        report = apply_plan(small, plan, verify=((), kwargs))
        assert report.error is not None and report.error < EXACT
        with silence_units(model, plan):
            assert error(call(small, (), kwargs), call(model, (), kwargs)) < EXACT
            _, elsewhere = other_batch(example)
            assert error(call(small, (), elsewhere), call(model, (), elsewhere)) < EXACT
        assert structures.params.evaluate(report.plan.counts) == pytest.approx(
            sum(p.numel() for p in small.parameters())
        )


def test_grouped_products_lose_experts_too() -> None:
    settings = {**MOE, "num_local_experts": 6}
    model = _transformers("MixtralForCausalLM", "MixtralConfig", CAUSAL_CALL, **settings).model()
    structures = discover(model, (), CAUSAL_CALL, kinds="expert", prove=True)
    plan = PruningPlan.of(model, structures, {s.name: [0, 2, 3, 5] for s in structures})
    with silence_units(model, plan):
        expected = model(**CAUSAL_CALL).logits
    report = apply_plan(model, plan, verify=((), CAUSAL_CALL))
    assert report.error is not None and report.error < EXACT
    assert torch.allclose(model(**CAUSAL_CALL).logits, expected, atol=1e-4)
