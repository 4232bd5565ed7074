"""prove: which structures can go, found without leaving a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.discovery import trace_structures
from lightning_compress.plan import PruningPlan
from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import AttributeEdit, Slice, Structure, Structures
from lightning_compress.surgery import SurgeryError, apply_plan, prove
from lightning_compress.surgery.workbench import ATTEMPTS, Workbench
from tests.surgery.state_of import state_of
from tests.zoo import MODELS

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "name", ["BERT", "GPT-2", "nn.TransformerEncoder", "packed attention, literal sizes", "ResNet", "LSTM"]
)
def test_the_model_is_left_exactly_as_it_was(name: str) -> None:
    example = MODELS[name]
    model = example.model().train()
    kwargs = example.kwargs or {}
    structures = trace_structures(model, example.args, kwargs)
    before = state_of(model)
    proven = prove(model, structures, example.args, kwargs)
    assert state_of(model) == before
    assert [s.name for s in proven] == [s.name for s in structures]
    assert all(s.tier is not None for s in proven) and all(s.tier is None for s in structures)
    assert proven.params.evaluate(proven.counts) == structures.params.evaluate(structures.counts)


def test_edits_are_sizes_not_numbers() -> None:
    example = MODELS["packed attention"]
    model = example.model()
    proven = prove(model, trace_structures(model, example.args), example.args)
    head = next(s for s in proven if s.kind == "head")
    assert head.tier == "native"
    assert head.edits == (AttributeEdit("body", "heads", Polynomial.variable(head.name)),)


def test_sizes_between_shims_have_the_original_width_as_a_constant() -> None:
    example = MODELS["GPT-2"]
    model = example.model()
    proven = prove(model, trace_structures(model, (), example.kwargs), (), example.kwargs)
    head = next(s for s in proven if s.kind == "head")
    sizes = {e.attribute: e.size for e in head.edits if isinstance(e, AttributeEdit)}
    assert sizes["split_size"] == 12 * Polynomial.variable(head.name)  # between the weights: heads * 12 dims for good
    assert len(sizes["nf"].variables) == 3  # the packed layer itself: heads, Q/K dims and V/O dims


class Network(nn.Module):
    """A good layer, a layer that divides by its width, and one whose output is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        self.up, self.down = nn.Parameter(torch.randn(9, 6)), nn.Parameter(torch.randn(6, 9))
        self.dead = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6))
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.good(x)
        x = (x @ self.up.T) / self.up.shape[0] @ self.down.T
        return self.out(x + 0 * self.dead(x))


def test_what_cannot_go_is_pinned_with_its_reason_and_spoils_nothing_else() -> None:
    model = Network()
    structures = trace_structures(model, (X,), kinds="ffn")
    structures = structures.rebuilt(s for s in structures if s.units in (7, 8, 9))
    assert sorted(s.units for s in structures) == [7, 8, 9]
    proven = prove(model, structures, (X,))
    assert [(s.units, s.tier) for s in proven if s.units != 7] == [(8, "native")]
    reasons = {p.units: p.reasons[0] for p in proven.pinned if p not in structures.pinned}
    assert "native removal: the outputs differ by" in reasons[9]
    assert "scatter/gather shim: 'up' belongs to no layer whose output or input carries the units" in reasons[9]


def test_units_without_influence_are_pinned() -> None:
    class Multiplied(Network):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + 0 * (x * self.dead[2].weight.sum()) + 0 * self.dead(x))

    model = Multiplied()
    table = torch.arange(7).unsqueeze(1)
    pieces = (
        Slice("dead.0.weight", 0, 7, table, "producer"),
        Slice("dead.0.bias", 0, 7, table, "producer"),
        Slice("out.weight", 0, 4, torch.arange(4).unsqueeze(1), "producer"),
    )
    # the anchor of this structure is the whole model, whose outputs the weights of "dead" do not reach
    structure = Structure("dead", "ffn", 7, (*pieces[:2], Slice("dead.2.weight", 1, 7, table, "consumer", True)))
    outside = Structure(
        "outside", "ffn", 4, (pieces[2], Slice("up", 1, 6, torch.arange(4).unsqueeze(1), "consumer", True))
    )
    proven = prove(model, Structures([structure, outside]), (X,))
    reasons = {p.name: p.reasons[0] for p in proven.pinned}
    assert (
        reasons["outside"]
        == "its weights do not influence the outputs of the traced call, so that nothing can be verified"
    )


def test_a_single_unit_cannot_go() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    (structure,) = trace_structures(model, (X,))
    pieces = tuple(
        Slice(s.parameter, s.axis, s.size, torch.arange(8).unsqueeze(0), s.role, s.zero) for s in structure.slices
    )
    proven = prove(model, Structures([Structure("one", "ffn", 1, pieces)]), (X,))
    assert not proven and proven.pinned[0].reasons == ("it has a single unit, and one must stay",)


def reasons(structures: Structures) -> str:
    return "\n".join(reason for family in structures.pinned for reason in family.reasons)


def test_weights_that_are_not_finite_or_are_views_are_pinned() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    structures = trace_structures(model, (X,))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    assert "'0.weight' holds NaN or infinity" in reasons(prove(broken, structures, (X,)))
    flat = torch.randn(80)
    model[0].weight.data, model[2].weight.data = flat[:48].view(8, 6), flat[40:72].view(4, 8)
    assert "share memory with no other tensor" in reasons(prove(model, structures, (X,)))


def test_structures_of_another_model_are_refused() -> None:
    structures = trace_structures(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), (X,))
    with pytest.raises(ValueError, match=r"axis 0 of '0.weight' to have size 8, .* but got 9: .* another model"):
        prove(nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)), structures, (X,))
    with pytest.raises(ValueError, match=r"Expected the model to have '0.weight' of structure 'ffn'"):
        prove(nn.Linear(6, 8), structures, (X,))


def test_wrapped_models_and_failing_examples_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    structures = trace_structures(model, (X,))
    with pytest.raises(SurgeryError, match="got DataParallel"):
        prove(nn.DataParallel(model), structures, (X,))
    before = state_of(model)
    with pytest.raises(SurgeryError, match="Expected the example call to run in evaluation mode and float64"):
        prove(model, structures, (X[:, :3],))
    assert state_of(model) == before


def test_no_structures() -> None:
    assert list(prove(nn.Linear(6, 2), Structures(), (X,))) == []


class Attempts:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.places: list[str] = []
        original = Workbench.error_of

        def error_of(bench: Workbench, removals: Any, path: str = "") -> Any:
            self.places.append(path)
            return original(bench, removals, path)

        monkeypatch.setattr(Workbench, "error_of", error_of)


def test_look_alikes_share_one_search(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deep(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(layers)
            )

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer["down"](layer["up"](x).relu())
            return x

    counts = []
    for layers in (2, 6):
        attempts = Attempts(monkeypatch)
        model = Deep(layers)
        proven = prove(model, trace_structures(model, (X,)), (X,))
        assert len(proven) == layers
        counts.append(len(attempts.places))
        monkeypatch.undo()
    assert counts == [3, 3]  # one for the first, two for all together


def test_a_search_without_end_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Maze(nn.Module):
        """Twenty attributes look like the number of units, and no set of them helps."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(9, 6)), nn.Parameter(torch.randn(6, 9))
            for i in range(20):
                setattr(self, f"size_{i}", 9)

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.up.T) / self.up.shape[0] @ self.down.T

    attempts = Attempts(monkeypatch)
    model = Maze()
    proven = prove(model, trace_structures(model, (X,), kinds="ffn"), (X,))
    assert not proven and len(attempts.places) <= 2 * ATTEMPTS


def test_most_attempts_run_on_the_innermost_module(monkeypatch: pytest.MonkeyPatch) -> None:
    example = MODELS["BERT"]
    model = example.model()
    structures = trace_structures(model, (), example.kwargs)
    attempts = Attempts(monkeypatch)
    prove(model, structures, (), example.kwargs)
    whole = sum(not place for place in attempts.places)
    assert whole < len(attempts.places) / 2
    assert {p for p in attempts.places if p} >= {"bert.encoder.layer.0.attention"}


def test_every_attempt_starts_from_the_same_state() -> None:
    class Counting(nn.Module):
        """Returns something else at every second call."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.calls = nn.Linear(6, 8), nn.Linear(8, 6), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.down(self.up(x)) * (1 + self.calls % 2)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = Counting(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(self.inner(x)))

    model = Twice()
    structures = trace_structures(model, (X,), kinds="ffn")
    chosen = structures.rebuilt(s for s in structures if s.units == 8)
    model.inner.calls = 0
    proven = prove(model, chosen, (X,))
    assert [s.tier for s in proven] == ["native"]
    assert model.inner.calls == 0


def test_a_module_that_cannot_be_run_alone_is_judged_by_the_whole_model() -> None:
    scale: list[float] = []

    class Scaled(nn.Module):
        """Needs what its parent prepared."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x)) * scale.pop()

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = Scaled(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            scale.append(2.0)
            return self.out(self.inner(x))

    model = Parent()
    structures = trace_structures(model, (X,), kinds="ffn")
    proven = prove(model, structures.rebuilt(s for s in structures if s.units == 8), (X,))
    assert [s.tier for s in proven] == ["native"]


class Halves(nn.Module):
    """Returns one half of what it makes and reads the other: 8 + 7 positions are still halved into 8 and 7."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.down = nn.Linear(6, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.packed(x).chunk(2, -1)
        return left, self.down(torch.relu(right))


def test_what_holds_for_one_unit_by_chance_is_tried_with_many() -> None:
    model = Halves()
    (structure,) = prove(model, trace_structures(model, (X,)), (X,))
    assert structure.tier == "shim"
    small = copy.deepcopy(model)
    apply_plan(small, PruningPlan.of(model, [structure], {structure.name: [2, 5]}), verify=((X,), {}))
    assert small.packed.weight.shape == (10, 6)


class Chatty(nn.Module):
    """Also returns its hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.up(x))
        return self.down(hidden), hidden


class Listener(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Chatty(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0])


def test_outputs_of_a_module_that_nobody_reads_may_change() -> None:
    """Attention weights, often: their shape shrinks with the heads."""
    model = Listener()
    found = prove(model, trace_structures(model, (X,)), (X,))
    (structure,) = (s for s in found if s.name == "inner.ffn")
    assert structure.tier == "native"


def test_structures_that_go_alone_but_not_together_get_another_way() -> None:
    class Quarrel(nn.Module):
        """Each width may lose half, but not both."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 9), nn.Linear(9, 4)
            self.first, self.second = 8, 9

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x).view(-1, self.first))
            x = self.d(self.c(x).view(-1, self.second))
            return x if self.first + self.second >= 12 else 2 * x

    model = Quarrel()
    structures = trace_structures(model, (X,), kinds="ffn")
    structures = structures.rebuilt(s for s in structures if s.units in (8, 9))
    proven = prove(model, structures, (X,))
    assert [(s.units, s.tier) for s in proven] == [(8, "native"), (9, "shim")]
    assert (model.first, model.second) == (8, 9)


def test_structures_that_never_fit_together_are_pinned() -> None:
    class Feud(nn.Module):
        """Each width may lose half, but not both, and a shim does not help the raw weights."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6, 8))
            self.c, self.d = nn.Parameter(torch.randn(9, 6)), nn.Parameter(torch.randn(4, 9))

        def forward(self, x: Tensor) -> Tensor:
            x = x @ self.a.T @ self.b.T @ self.c.T @ self.d.T
            return x if self.a.shape[0] + self.c.shape[0] >= 12 else 2 * x

    model = Feud()
    structures = trace_structures(model, (X,), kinds="ffn")
    structures = structures.rebuilt(s for s in structures if s.units in (8, 9))
    assert len(structures) == 2
    proven = prove(model, structures, (X,))
    assert [(s.units, s.tier) for s in proven] == [(8, "native")]
    assert "it does not fit together with the other structures: the outputs differ by" in reasons(proven)
