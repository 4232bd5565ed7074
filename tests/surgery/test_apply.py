"""apply_plan: what it does, what it refuses, and that a refusal leaves everything as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.analysis import discover
from lightning_compress.plan import PruningPlan
from lightning_compress.structures import AttributeEdit, ShimEdit, Slice, Structure, Structures
from lightning_compress.surgery import SurgeryError, SurgeryReport, apply_plan, zero_units
from tests.surgery.state_of import state_of
from tests.zoo import MODELS

WIDTH, HEADS, DIMS = 12, 3, 4
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
VERIFY = ((X,), {})


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))


def halved(model: nn.Module, *args: Any, prove: bool = False, kinds: Any = None) -> PruningPlan:
    structures = discover(model, args, prove=prove, kinds=kinds)
    assert structures
    return PruningPlan.of(model, structures, {s.name: list(range(0, s.units, 2)) for s in structures})


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


# What it does


def test_the_report_says_what_happened() -> None:
    model = mlp()
    plan = halved(model, X)
    report = apply_plan(model, plan, verify=VERIFY)
    assert isinstance(report, SurgeryReport)
    (entry,) = report.structures
    assert (entry.kind, entry.units_before, entry.units_after, entry.tier, entry.edits) == ("ffn", 8, 4, "native", ())
    assert report.parameters_before == 6 * 8 + 8 + 8 * 4 + 4
    assert report.parameters_after == 6 * 4 + 4 + 4 * 4 + 4 == sum(p.numel() for p in model.parameters())
    assert report.error is not None and report.error <= 1e-12
    assert report.perturbed_error is not None and report.perturbed_error <= 1e-12
    assert report.seconds > 0 and report.plan.structures[0].tier == "native"
    assert "92 -> 48 parameters (52.2%), verified" in str(report) and "8 -> 4 (native)" in str(report)


def test_parameters_keep_identity_mode_and_gradients() -> None:
    model = mlp()
    model(X).sum().backward()
    gradient = model[2].weight.grad.clone()
    parameters, modes = list(model.parameters()), [m.training for m in model.modules()]
    apply_plan(model, halved(model, X), verify=VERIFY)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model[2].weight.grad, gradient[:, ::2])
    assert (model[0].out_features, model[2].in_features) == (4, 4)


def test_random_state_is_left_alone() -> None:
    model = mlp()
    plan, state = halved(model, X), torch.get_rng_state()
    apply_plan(model, plan, verify=VERIFY)
    assert torch.equal(torch.get_rng_state(), state)


def test_removing_nothing_changes_nothing() -> None:
    model = mlp()
    structures = discover(model, (X,))
    before = state_of(model)
    report = apply_plan(model, PruningPlan.of(model, structures, {}), verify=VERIFY)
    assert state_of(model) == before
    assert report.error == 0.0 and report.structures[0].tier is None and report.parameters_after == 92
    assert "8 -> 8 (whole)" in str(report)


def test_all_but_one_unit() -> None:
    model = mlp()
    structures = discover(model, (X,))
    apply_plan(model, PruningPlan.of(model, structures, {structures[0].name: [7]}), verify=VERIFY)
    assert model[0].weight.shape == (1, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_verified_in_double_and_stays_half(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    x = X.to(dtype)
    plan = halved(model, x)
    report = apply_plan(model, plan, verify=((x,), {}))
    assert report.error is not None and report.error <= 1e-12
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_frozen_parameters_stay_frozen() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    apply_plan(model, halved(model, X), verify=VERIFY)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    model(X).sum().backward()


def test_a_proven_plan_is_replayed_without_an_example_on_demand() -> None:
    model = mlp()
    twin, saved = copy.deepcopy(model), halved(model, X, prove=True).to_json()
    plan = PruningPlan.from_json(saved)
    apply_plan(model, plan, verify=VERIFY)
    report = apply_plan(twin, plan, unverified=True)
    assert report.error is None and report.perturbed_error is None and "not verified" in str(report)
    assert torch.equal(twin(X), model(X))


def test_the_plan_of_a_report_replays_a_search() -> None:
    example = MODELS["packed attention"]
    model = example.model()
    twin = copy.deepcopy(model)
    report = apply_plan(model, halved(model, *example.args), verify=(example.args, {}))
    assert {s.tier for s in report.structures} == {"native", "shim"}
    apply_plan(twin, PruningPlan.from_json(report.plan.to_json()))
    assert torch.equal(twin(*example.args), model(*example.args))


@pytest.mark.parametrize("name", ["packed attention", "packed attention, literal sizes", "GPT-2", "BERT"])
def test_proven_edits_hold_for_every_kept_count(name: str) -> None:
    example = MODELS[name]
    model = example.model()
    structures = discover(model, example.args, example.kwargs, prove=True)
    for kept in (1, 2, 4):
        small = copy.deepcopy(model)
        plan = PruningPlan.of(small, structures, {s.name: range(s.units)[-kept:] for s in structures if s.units > kept})
        report = apply_plan(small, plan, verify=(example.args, example.kwargs or {}))
        assert [s.tier for s in report.structures] == [s.tier for s in structures]  # no second search was needed


def test_a_shim_costs_parameters_of_the_kept_units_only() -> None:
    example = MODELS["packed attention, literal sizes"]
    model = example.model().double()
    x = example.args[0].double()
    plan = halved(model, x, kinds="qk_dim")
    zeroed = copy.deepcopy(model)
    zero_units(zeroed, plan)
    report = apply_plan(model, plan, verify=((x,), {}))
    assert report.structures[0].tier == "shim"
    assert report.parameters_after == 16507 - 2 * 5 * 6 * (60 + 1)  # q and k, 5 heads, 6 of 12 dims, weights and biases
    assert error(model(x), zeroed(x)) < 1e-12


def test_inference_mode_around_it_leaves_no_mark() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    with torch.inference_mode():
        x = X * 1
        apply_plan(model, halved(model, x, prove=True), [optimizer], verify=((x,), {}))
    assert not any(p.is_inference() for p in model.parameters())
    optimizer.zero_grad()
    model(X).sum().backward()
    optimizer.step()


def test_companions_that_cannot_have_a_shim_stay_whole_and_so_does_their_optimizer_state() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        h = m.a(x) * m.gate
        return m.b(h / h.shape[-1] ** 0.5)  # only the original width gives the right number

    model = Hostile(compute, gate=nn.Parameter(torch.rand(8))).double()
    optimizer = torch.optim.Adam(model.parameters())
    x = X.double()
    model(x).sum().backward()
    optimizer.step()
    plan = halved(model, x)
    assert "gate" in plan.shapes
    zeroed = copy.deepcopy(model)
    zero_units(zeroed, plan)
    report = apply_plan(model, plan, [optimizer], verify=((x,), {}))
    assert report.structures[0].tier == "shim" and model.gate.shape == (8,) and model.a.weight.shape == (4, 6)
    assert error(model(x), zeroed(x)) < 1e-12
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    model(x).sum().backward()
    optimizer.step()


# Shared parameters


class Tied(nn.Module):
    """Two feed-forward layers with one set of weights, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), mlp()
        self.out = nn.Linear(4, 6)
        self.b[0].weight, self.b[0].bias, self.b[2].weight = self.a[0].weight, self.a[0].bias, self.a[2].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x + self.out(self.a(x)))


def test_tied_weights_are_cut_once_and_every_owner_follows() -> None:
    model = Tied().double()
    zeroed, plan = copy.deepcopy(model), halved(model, X.double())
    zero_units(zeroed, plan)
    apply_plan(model, plan, verify=((X.double(),), {}))
    assert model.b[0].weight is model.a[0].weight and model.a[0].weight.shape == (4, 6)
    assert (model.a[0].out_features, model.b[0].out_features, model.b[2].in_features) == (4, 4, 4)
    assert error(model(X.double()), zeroed(X.double())) < 1e-12


def test_names_of_a_shared_parameter_that_disagree_are_refused() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    table = torch.arange(4).unsqueeze(1)
    pieces = (Slice("a.weight", 0, 4, table, "producer"), Slice("b.weight", 1, 4, table, "consumer", True))
    plan = PruningPlan.of(model, [Structure("s", "ffn", 4, pieces, tier="native")], {"s": [0]})
    before = state_of(model)
    with pytest.raises(SurgeryError, match=r"'a.weight' and 'b.weight' are one tensor and the plan cuts axes \[0\]"):
        apply_plan(model, plan, unverified=True)
    assert state_of(model) == before


def test_parameters_that_are_views_of_one_storage_are_refused() -> None:
    model = mlp()
    flat = torch.randn(96)
    model[0].weight.data, model[2].weight.data = flat[:48].view(8, 6), flat[40:72].view(4, 8)
    with pytest.raises(SurgeryError, match=r"Expected '0.weight' to share memory with no other tensor, but '2.weight'"):
        apply_plan(model, halved(model, X), verify=VERIFY)
    model[2].weight.data = flat[48:80].view(4, 8)  # side by side: each is cut out of its own part
    apply_plan(model, halved(model, X), verify=VERIFY)


# Attention with sizes in all kinds of places


class Attention(nn.Module):
    """Self-attention whose ``forward`` asks ``sizes()`` for (heads, dims)."""

    def __init__(self, sizes: Callable[[Any], tuple[int, int]], **attributes: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIMS) for _ in range(3))
        self.o = nn.Linear(HEADS * DIMS, WIDTH)
        self.sizes = sizes
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        heads, dims = self.sizes(self)
        q, k, v = (layer(x).view(*x.shape[:2], heads, dims).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / DIMS**0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Config:
    def __init__(self) -> None:
        self.heads, self.hidden = HEADS, WIDTH


SEQUENCE = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(4)).double()
PLACES: dict[str, tuple[Callable[[Any], tuple[int, int]], dict[str, Any], str | None]] = {
    "attribute": (lambda m: (m.heads, -1), {"heads": HEADS}, "heads"),
    "attribute among equal ones": (lambda m: (m.b, -1), {"a": HEADS, "b": HEADS, "c": HEADS}, "b"),
    "two attributes": (lambda m: (m.heads, m.width // m.heads), {"heads": HEADS, "width": HEADS * DIMS}, "heads width"),
    "private attribute": (lambda m: (m._heads, -1), {"_heads": HEADS}, "_heads"),
    "tuple": (lambda m: m.shape, {"shape": (HEADS, DIMS)}, "shape[0]"),
    "configuration": (lambda m: (m.config.heads, -1), {"config": Config()}, "config.heads"),
    "the weight itself": (lambda m: (m.q.weight.shape[0] // DIMS, DIMS), {}, ""),
    "the layer": (lambda m: (m.q.out_features // DIMS, DIMS), {}, ""),
    "dims only": (lambda m: (-1, DIMS), {}, ""),
    "literal": (lambda m: (HEADS, DIMS), {}, None),
}


@pytest.mark.parametrize("place", PLACES)
def test_heads_go_wherever_their_number_is_kept(place: str) -> None:
    sizes, attributes, edited = PLACES[place]
    model = Attention(sizes, **attributes).double()
    plan = halved(model, SEQUENCE, kinds="head")
    zeroed = copy.deepcopy(model)
    zero_units(zeroed, plan)
    report = apply_plan(model, plan, verify=((SEQUENCE,), {}))
    assert error(model(SEQUENCE), zeroed(SEQUENCE)) < 1e-12
    other = SEQUENCE[:1, :3] * 2
    assert error(model(other), zeroed(other)) < 1e-12
    assert PruningPlan.from_json(report.plan.to_json()) == report.plan
    (entry,) = report.structures
    found = " ".join(sorted(e.attribute for e in entry.edits if isinstance(e, AttributeEdit)))
    assert (entry.tier, found) == (("shim", "") if edited is None else ("native", edited))


def test_a_configuration_shared_with_others_is_not_touched() -> None:
    sizes, _, _ = PLACES["configuration"]
    config = Config()
    model = Attention(sizes, config=config).double()
    apply_plan(model, halved(model, SEQUENCE, kinds="head"), verify=((SEQUENCE,), {}))
    assert config.heads == HEADS and model.config.heads == 2 and model.config is not config


def test_heads_dims_and_a_shared_attribute_go_together() -> None:
    """Removing heads alone cannot tell heads * qk from heads * vo, of which each has an attribute."""

    class Split(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k = (layer(x).view(*x.shape[:2], -1, self.qk).transpose(1, 2) for layer in (self.q, self.k))
            v = self.v(x).view(*x.shape[:2], self.total // self.vo, self.vo).transpose(1, 2)
            weights = (q @ k.transpose(-1, -2) / DIMS**0.5).softmax(-1)
            return self.o((weights @ v).transpose(1, 2).reshape(*x.shape[:2], self.total))

    model = Split(lambda m: (0, 0), qk=DIMS, vo=DIMS, total=HEADS * DIMS).double()
    structures = discover(model, (SEQUENCE,), prove=True)
    assert {s.kind: s.tier for s in structures} == {"head": "native", "qk_dim": "native", "vo_dim": "native"}
    kept = {s.name: {"head": [1, 2], "qk_dim": [0, 2, 3], "vo_dim": [1]}[s.kind] for s in structures}
    plan = PruningPlan.of(model, structures, kept)
    zeroed = copy.deepcopy(model)
    zero_units(zeroed, plan)
    apply_plan(model, plan, verify=((SEQUENCE,), {}))
    assert (model.qk, model.vo, model.total) == (3, 1, 2)
    assert error(model(SEQUENCE), zeroed(SEQUENCE)) < 1e-12


# Several rounds


@pytest.mark.parametrize(
    "name", ["packed attention", "packed attention, literal sizes", "GPT-2", "nn.MultiheadAttention", "T5"]
)
def test_gradual_removal_equals_removal_at_once(name: str) -> None:
    example = MODELS[name]
    args = tuple(a.double() if a.is_floating_point() else a for a in example.args)
    verify = (args, example.kwargs or {})
    once = example.model().double()
    gradual = copy.deepcopy(once)
    structures: Structures = discover(once, *verify, prove=True)
    first = PruningPlan.of(once, structures, {s.name: range(1, s.units) for s in structures if s.units > 2})
    apply_plan(gradual, first, verify=verify)
    smaller = first.shrunk(structures)
    second = PruningPlan.of(gradual, smaller, {s.name: range(s.units - 1) for s in smaller if s.units > 2})
    apply_plan(gradual, second, verify=verify)
    apply_plan(once, first.compose(second), verify=verify)
    for (parameter, a), b in zip(once.named_parameters(), gradual.parameters(), strict=True):
        assert torch.equal(a, b), parameter
    from lightning_compress.surgery.verify import Rehearsal, difference

    with Rehearsal(once) as at_once, Rehearsal(gradual) as in_rounds:
        assert difference(at_once.run(once, *verify), in_rounds.run(gradual, *verify)) < 1e-12


@pytest.mark.parametrize("first_kind", ["qk_dim", "head"])
def test_kinds_can_go_one_after_the_other(first_kind: str) -> None:
    """Heads go natively over an interface that the shim of the Q/K dims made, and the other way round."""
    example = MODELS["packed attention"]
    model, x = example.model().double(), example.args[0].double()
    once = copy.deepcopy(model)
    structures = discover(model, (x,), kinds=("head", "qk_dim"), prove=True)
    assert {s.kind: s.tier for s in structures} == {"head": "native", "qk_dim": "shim"}
    kept = {s.name: list(range(0, s.units, 2)) for s in structures}
    whole = PruningPlan.of(model, structures, kept)
    apply_plan(once, whole, verify=((x,), {}))
    (first,) = (s.name for s in structures if s.kind == first_kind)
    (second,) = (s.name for s in structures if s.kind != first_kind)
    plan = PruningPlan.of(model, structures, {first: kept[first]})
    apply_plan(model, plan, verify=((x,), {}))
    then = PruningPlan.of(model, plan.shrunk(structures), {second: kept[second]})
    report = apply_plan(model, then, verify=((x,), {}))
    assert [s.tier for s in report.structures] == [s.tier for s in structures]
    assert error(model(x), once(x)) < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), once.parameters(), strict=True))


# Refusals


def refused(model: nn.Module, plan: PruningPlan, match: str, optimizers: Any = (), verify: Any = VERIFY) -> None:
    before = state_of(model, optimizers)
    with pytest.raises(SurgeryError, match=match):
        apply_plan(model, plan, optimizers, verify=verify, unverified=True)
    assert state_of(model, optimizers) == before


def test_a_structure_that_cannot_go_is_named_and_nothing_changes() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(4, 8))
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return F.linear(F.linear(x, self.up) / self.up.shape[0], self.down)

    model = Stubborn()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    plan = halved(model, X)
    refused(
        model,
        plan,
        r"'ffn' \(ffn, 8 -> 4 units\) to be removable, but native removal: the outputs differ by .*"
        r"scatter/gather shim: .*Nothing was changed; leave it out of the plan",
        [optimizer],
    )


def test_a_wrong_proof_is_found_out() -> None:
    """Edits that came with the plan are verified like any others, and replaced where others work."""
    sizes, attributes, _ = PLACES["attribute"]
    model = Attention(sizes, **attributes).double()
    plan = halved(model, SEQUENCE, prove=True, kinds="head")
    lie = replace(plan, structures=tuple(replace(s, edits=()) for s in plan.structures))
    report = apply_plan(model, lie, verify=((SEQUENCE,), {}))
    assert model.heads == 2 and report.structures[0].edits


def test_a_difference_that_only_the_true_weights_show_is_found() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        h = m.a(x) * m.gain
        return m.b(h / h.shape[-1] if float(m.gain) == 1.0 else h)  # perturbed weights take the other branch

    model = Hostile(compute, gain=nn.Parameter(torch.ones(()))).double()
    model.gain.requires_grad_(False)
    table = torch.arange(8).unsqueeze(1)
    pieces = (
        *(Slice(name, 0, 8, table, "producer") for name in ("a.weight", "a.bias")),
        Slice("b.weight", 1, 8, table, "consumer", True),
    )
    plan = PruningPlan.of(model, [Structure("ffn", "ffn", 8, pieces)], {"ffn": [0, 1, 2]})
    verify = ((X.double(),), {})
    refused(model, plan, "outputs differ by .* on the true weights. Nothing was changed", verify=verify)


def test_a_later_failure_restores_an_earlier_success() -> None:
    """The optimizer is cut last; when that fails, tensors, attributes and shims go back."""

    class Brittle(dict):  # type: ignore[type-arg]
        def __setitem__(self, key: Any, value: Any) -> None:
            if self.get("armed"):
                raise RuntimeError("no room")
            super().__setitem__(key, value)

    example = MODELS["packed attention, literal sizes"]
    model = example.model()
    plan = halved(model, *example.args)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameter = model.get_parameter(plan.structures[0].parameters[0])
    optimizer.state[parameter] = Brittle(momentum_buffer=torch.ones_like(parameter), armed=True)
    before = state_of(model, [optimizer])
    with pytest.raises(RuntimeError, match="no room"):
        apply_plan(model, plan, [optimizer], verify=(example.args, {}))
    assert state_of(model, [optimizer]) == before


def test_an_example_is_needed_for_a_search() -> None:
    model = mlp()
    refused(
        model, halved(model, X), r"Expected verify=\(args, kwargs\), an example call .* '.*ffn' is known", verify=None
    )


@pytest.mark.parametrize("verify", [X, (X,), (X, {}), ((X,), [])])
def test_a_malformed_example_is_explained(verify: Any) -> None:
    model = mlp()
    with pytest.raises(TypeError, match=r"Expected verify to be \(args, kwargs\).* pass verify=\(\(x,\), \{\}\)"):
        apply_plan(model, halved(model, X), verify=verify)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = mlp()
    plan = halved(model, X)
    with torch.no_grad():
        model[2].weight[0, 0] = value
    refused(model, plan, r"Expected finite weights, but '2.weight' holds NaN or infinity")


def test_nan_outside_the_plan_is_found_in_the_outputs() -> None:
    model = nn.Sequential(mlp(), nn.Linear(4, 4))
    plan = halved(model, X, kinds="ffn")
    plan = PruningPlan.of(model, [s for s in plan.structures if s.units == 8], {})
    plan = PruningPlan.of(model, plan.structures, {s.name: [0] for s in plan.structures})
    with torch.no_grad():
        model[1].bias[0] = float("nan")
    refused(model, plan, "output holds NaN before anything is removed")


def test_an_example_call_that_fails_is_reported() -> None:
    model = mlp()
    refused(model, halved(model, X), "to run in evaluation mode and float64, but it raised", verify=((X[:, :2],), {}))


def test_a_plan_for_another_model() -> None:
    plan = halved(mlp(), X)
    with pytest.raises(ValueError, match="This is a plan for another model"):
        apply_plan(nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)), plan, verify=VERIFY)
    model = mlp()
    apply_plan(model, plan, verify=VERIFY)
    with pytest.raises(ValueError, match="already applied to this model"):
        apply_plan(model, plan, verify=VERIFY)


def test_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"Expected model to be an nn\.Module, but got dict"):
        apply_plan({}, halved(mlp(), X), verify=VERIFY)  # type: ignore[arg-type]


def test_wrapped_models_are_refused_with_the_way_out() -> None:
    model = mlp()
    plan = halved(model, X)
    refused(nn.DataParallel(model), plan, r"got DataParallel\. Pass model\.module")
    refused(nn.Sequential(nn.DataParallel(model)), plan, "got DataParallel at '0'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(model)
        compiled = torch.compile(model)
    with pytest.raises(SurgeryError, match="script the smaller one"):
        apply_plan(scripted, plan, verify=VERIFY)
    with pytest.raises(SurgeryError, match=r"got OptimizedModule. Pass model._orig_mod"):
        apply_plan(compiled, plan, verify=VERIFY)
    model.compile()
    with pytest.raises(SurgeryError, match=r"Sequential was compiled in place by module.compile\(\)"):
        apply_plan(model, plan, verify=VERIFY)


def test_a_scripted_part_is_no_obstacle_unless_its_weights_are_to_go() -> None:
    def with_scripted_part() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Sequential(mlp(), torch.jit.script(nn.Linear(4, 5)))

    model = with_scripted_part()
    apply_plan(model, halved(model, X, prove=True), verify=VERIFY)
    assert model[0][0].out_features == 4
    model = with_scripted_part()
    table = torch.arange(5).unsqueeze(1)
    plan = PruningPlan.of(
        model, [Structure("s", "ffn", 5, (Slice("1.weight", 0, 5, table, "producer"),), tier="native")], {"s": [0]}
    )
    with pytest.raises(SurgeryError, match="weights of '1' to be those of a plain module, but it is scripted"):
        apply_plan(model, plan, unverified=True)


class DistributedDataParallel(nn.Module):
    """Bears the name and the home of torch's wrapper, without a process group."""

    __module__ = "torch.nn.parallel.distributed"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_distributed_wrappers_are_refused() -> None:
    model = mlp()
    refused(DistributedDataParallel(model), halved(model, X), "got DistributedDataParallel. Pass model.module")


def test_edits_that_name_no_module_are_refused() -> None:
    model = mlp()
    plan = halved(model, X, prove=True)
    lost = replace(plan, structures=tuple(replace(s, edits=(ShimEdit("9", "output", -1),)) for s in plan.structures))
    refused(model, lost, "Expected the model to have a module '9', as the plan's edits say", verify=None)
    lost = replace(plan, structures=tuple(replace(s, edits=(ShimEdit("1", "output", -1),)) for s in plan.structures))
    refused(model, lost, "Expected a parameter of '1' to face its output shim in structure", verify=None)


# Hostile forwards: a right result or a refusal, never a wrong result


class Hostile(nn.Module):
    def __init__(self, compute: Callable[[Any, Tensor], Tensor], **modules: Any) -> None:
        super().__init__()
        self.compute = compute
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


HOSTILE: dict[str, Callable[[], nn.Module]] = {
    "shape in arithmetic": lambda: Hostile(lambda m, x: m.b((h := m.a(x)) / h.shape[-1] ** 0.5)),
    "gate of a plain tensor": lambda: Hostile(lambda m, x: m.b(m.a(x) * m.gate), gate=torch.rand(8)),
    "gate of a parameter": lambda: Hostile(lambda m, x: m.b(m.a(x) * m.gate), gate=nn.Parameter(torch.rand(8))),
    "literal slice": lambda: Hostile(lambda m, x: m.b(F.pad(m.a(x)[:, 2:6], (2, 2)))),
    "flip": lambda: Hostile(lambda m, x: m.b(m.a(x).flip(-1))),
    "softmax": lambda: Hostile(lambda m, x: m.b(m.a(x).softmax(-1))),
    "standard deviation": lambda: Hostile(lambda m, x: m.b(m.a(x)) * m.a(x).std(-1, keepdim=True)),
    "top of the units": lambda: Hostile(lambda m, x: m.b(F.pad(m.a(x).topk(3)[0], (0, 5)))),
    "escape to a list": lambda: Hostile(lambda m, x: m.b(torch.tensor(m.a(x).tolist(), dtype=x.dtype))),
    "halves": lambda: Hostile(lambda m, x: m.b(torch.cat([h := F.glu(m.a(x)), h], -1))),
    "used as an index": lambda: Hostile(lambda m, x: m.b(m.a(x)) * m.table[m.units % 7], table=torch.rand(7), units=8),
    "two call paths": lambda: Hostile(lambda m, x: m.b(m.a(x)) if m.units == 8 else m.b(m.a(x)) + 0, units=8),
    "fixed permutation": lambda: Hostile(lambda m, x: m.b(m.a(x)[:, [7, 0, 6, 1, 5, 2, 4, 3]])),
    "layer twice": lambda: Hostile(lambda m, x: m.b(m.r(F.relu(m.r(m.a(x))))), r=nn.Linear(8, 8)),
    "norm between": lambda: Hostile(lambda m, x: m.b(m.n(m.a(x))), n=nn.LayerNorm(8)),
    "vmap": lambda: Hostile(lambda m, x: torch.vmap(lambda row: m.b(F.relu(m.a(row))))(x)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_forward_never_gives_a_wrong_result(name: str) -> None:
    model = HOSTILE[name]().double()
    x, other = X.double(), X.double()[:3] * 2 + 1
    structures = discover(model, (x,), prove=False)
    if not structures:
        return  # discovery understood that nothing can go
    plan = PruningPlan.of(model, structures, {s.name: list(range(0, s.units, 2)) for s in structures})
    zeroed, before = copy.deepcopy(model), state_of(model)
    zero_units(zeroed, plan)
    try:
        apply_plan(model, plan, verify=((x,), {}))
    except SurgeryError:
        assert state_of(model) == before
    else:
        assert error(model(x), zeroed(x)) < 1e-12 and error(model(other), zeroed(other)) < 1e-12


class Picky(nn.Module):
    """A kernel that wants multiples of 4 in single precision, and does not care in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        if hidden.dtype == torch.float32 and hidden.shape[-1] % 4:
            raise RuntimeError("alignment")
        return self.down(hidden)


def test_a_model_that_would_not_run_in_its_own_precision_is_left_whole() -> None:
    model, x = Picky(), torch.randn(4, 6)
    structures = discover(model, (x,), prove=True)
    before = state_of(model)
    with pytest.raises(SurgeryError, match=r"in its own precision .* RuntimeError: alignment"):
        apply_plan(model, PruningPlan.of(model, structures, {structures[0].name: [0, 1, 2]}), verify=((x,), {}))
    assert state_of(model) == before
    apply_plan(model, PruningPlan.of(model, structures, {structures[0].name: [0, 1, 2, 5]}), verify=((x,), {}))
    assert model(x).shape == (4, 3)


# Replays


class Packed(nn.Module):
    """Attention whose two heads have two dims, so that one attribute may count either."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.packed, self.out = 2, nn.Linear(5, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.packed(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).reshape(b, t, -1))


def test_what_was_only_proven_is_not_replayed_without_a_check() -> None:
    """A proof removes some units; the way that it finds need not hold for other kept counts."""
    torch.manual_seed(0)
    model, x = Packed().double(), torch.randn(2, 3, 5, dtype=torch.float64)
    structures = discover(model, (x,), prove=True)
    plan = PruningPlan.of(model, structures, {s.name: [0] for s in structures})
    before = state_of(model)
    with pytest.raises(SurgeryError, match=r"Expected verify=\(args, kwargs\), .* was never compared with"):
        apply_plan(model, plan)
    assert state_of(model) == before
    assert not apply_plan(copy.deepcopy(model), plan, unverified=True).plan.verified
    report = apply_plan(copy.deepcopy(model), plan, verify=((x,), {}))
    assert report.plan.verified and PruningPlan.from_json(report.plan.to_json()).verified
    replayed = copy.deepcopy(model)
    apply_plan(replayed, report.plan)
    zeroed = copy.deepcopy(model)
    zero_units(zeroed, plan)
    assert error(replayed(x), zeroed(x)) < 1e-12
