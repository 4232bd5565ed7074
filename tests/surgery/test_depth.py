"""Layers that go as a whole: found, passed by == removed, carried out, planned, refused."""

import copy
import pickle
from pathlib import Path
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
    explain,
    kept_fraction,
    make_plan,
    silence_units,
    unit_scores,
    zero_units,
)
from lightning_compress.structures import AttributeEdit, ModuleEdit, Passage
from lightning_compress.surgery.modules import GappedList, Skip
from tests.surgery.state_of import state_of
from tests.test_theorem import call, double, error, other_batch, step
from tests.zoo import CAUSAL_CALL, MODELS, TEXT_CALL

WIDTH = 6
EXACT = 1e-10


class Block(nn.Module):
    """x + down(gelu(up(norm(x)))); ``position`` says where in the stack it is."""

    def __init__(self, position: int = 0, ffn: int = 8) -> None:
        super().__init__()
        self.position, self.colour = position, "blue"
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, ffn), nn.Linear(ffn, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """A list of blocks between two linear layers; sub-classes walk over it in different ways."""

    def __init__(self, depth: int = 4, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.depth = depth
        self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(block(i) for i in range(depth))

    def walk(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.walk(self.first(x)))


class Indexed(Stack):
    def walk(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            x = self.blocks[i](x)
        return x


class Chosen(Stack):
    """Each layer by its key and its own step: only a module in its place keeps that."""

    def walk(self, x: Tensor) -> Tensor:
        for i, name in enumerate(("0", "1", "2", "3")):
            assert self.blocks.get_submodule(name).colour == "blue"
            x = self.blocks.get_submodule(name)(x) * (1 + i / 10)
        return x


class Windows(Stack):
    """Settings per layer that make no difference on the example, but would on another one."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = (100, 200, 100, 200)

    def walk(self, x: Tensor) -> Tensor:
        for window, block in zip(self.windows, self.blocks):  # noqa: B905
            x = block(x[:, -window:])
        return x


class PairBlock(Block):
    """Returns its second input beside its output, as position biases are handed on."""

    def forward(self, x: Tensor, *, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None, None]:
        return super().forward(x), bias, None


class Pairs(Stack):
    def __init__(self) -> None:
        super().__init__(block=PairBlock)

    def walk(self, x: Tensor) -> Tensor:
        bias = x.mean()
        for block in self.blocks:
            x, bias, _ = block(x, bias=bias)
        return x + bias


class Making(Pairs):
    """The first block makes what the others hand on."""

    def walk(self, x: Tensor) -> Tensor:
        bias: Any = None
        for i, block in enumerate(self.blocks):
            y, _, _ = block(x, bias=bias)
            x, bias = y, (x.mean() if i == 0 else bias)
        return x + bias


class InPlaceBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += self.down(F.gelu(self.up(self.norm(x))))
        return x


class Shared(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].up.weight = self.blocks[1].up.weight


class Recurrent(Stack):
    def walk(self, x: Tensor) -> Tensor:
        return super().walk(super().walk(x))


X = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
OTHER = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def plan_without(model: nn.Module, structures: Any, *layers: str, **widths: Any) -> PruningPlan:
    return PruningPlan.of(model, structures, {**{f"{layer}.layer": [] for layer in layers}, **widths})


@pytest.mark.parametrize(
    ("kind", "way"),
    [(Stack, "drop"), (Indexed, "drop"), (Chosen, "skip"), (Windows, "skip"), (Pairs, "drop")],
)
def test_passed_by_equals_removed(kind: type[nn.Module], way: str) -> None:
    dense = kind().double()
    optimizer = torch.optim.Adam(dense.parameters(), lr=1e-2)
    step(dense, optimizer, (X,), {})
    structures = discover(dense, (X,), kinds=("layer", "ffn"), prove=True)
    layers = [s for s in structures if s.kind == "layer"]
    assert [s.name for s in layers] == [f"blocks.{i}.layer" for i in range(4)]
    assert all(s.units == 1 and s.floor == 0 and s.members == (s.name.removesuffix(".layer"),) for s in layers)
    assert {e.way for s in layers for e in s.edits if isinstance(e, ModuleEdit)} == {way}
    plan = plan_without(dense, structures, "blocks.0", "blocks.2", **{"blocks.1.ffn": [0, 2, 5], "blocks.2.ffn": [1]})

    small, small_optimizer = copy.deepcopy((dense, optimizer))
    names = [n for n, _ in dense.named_parameters() if not n.startswith(("blocks.0", "blocks.2"))]
    report = apply_plan(small, plan, [small_optimizer], ((X,), {}))
    assert report.error is not None and report.error < EXACT
    assert [n for n, _ in small.named_parameters()] == names  # names stay in the coordinates of the original
    assert len(small_optimizer.param_groups[0]["params"]) == len(small_optimizer.state) == len(names)
    assert isinstance(small.blocks, GappedList) if way == "drop" else isinstance(small.blocks[0], Skip)
    assert list(small.blocks._modules) == (["1", "3"] if way == "drop" else ["0", "1", "2", "3"])

    before = dense(X)
    masks = silence_units(dense, plan)
    for x in (X, OTHER):
        assert error([small(x)], [dense(x)]) < EXACT
    assert error([dense(X)], [before]) > 1e-6
    gone = {id(p) for path in ("0", "2") for p in dense.blocks.get_submodule(path).parameters()}
    assert all(p.grad is not None for p in dense.parameters())
    dense.zero_grad()
    dense(X).square().sum().backward()
    assert all((p.grad is None) == (id(p) in gone) for p in dense.parameters())  # a masked model can be trained
    masks.remove()
    assert torch.equal(dense(X), before)

    for p in dense.parameters():  # one more step on both, with the state carried over
        p.grad = None
    with silence_units(dense, plan):
        keep = {n: p for n, p in dense.named_parameters() if id(p) not in gone}
        (call_loss := dense(X).square().sum() + dense(X).sum()).backward()
        assert call_loss.isfinite()
        cut = PruningPlan.of(dense, structures, {"blocks.1.ffn": [0, 2, 5]}).removed_positions()
        for (name, axis), positions in cut.items():
            keep[name].grad.index_fill_(axis, positions, 0)
        for parameter, state in optimizer.state.items():
            for (name, axis), positions in cut.items():
                if keep.get(name) is parameter:
                    state["exp_avg"].index_fill_(axis, positions, 0)
        optimizer.step()
        step(small, small_optimizer, (X,), {})
        assert error([small(X)], [dense(X)]) < EXACT


def test_a_plan_replays_without_a_search_and_is_rebuilt_from_its_file(tmp_path: Path) -> None:
    for kind in (Stack, Chosen, Pairs):
        model = kind().double()
        structures = discover(model, (X,), kinds=("layer", "ffn"), prove=True)
        plan = plan_without(model, structures, "blocks.1", **{"blocks.3.ffn": [0, 1]})
        small = copy.deepcopy(model)
        report = apply_plan(small, plan, verify=((X,), {}))
        report.plan.save(tmp_path / "plan.json")
        read = PruningPlan.load(tmp_path / "plan.json")
        assert read == report.plan
        fresh = kind().double()
        assert apply_plan(fresh, read).error is None
        fresh.load_state_dict(small.state_dict())
        assert torch.equal(fresh(X), small(X))
        assert torch.equal(pickle.loads(pickle.dumps(small))(X), small(X))
        assert {n: tuple(t.shape) for n, t in small.named_parameters() if n in plan.shapes} == plan.new_shapes()
        with pytest.raises(ValueError, match="already applied to this model"):
            apply_plan(small, read)
        with pytest.raises(ValueError, match="a plan for another model"):
            apply_plan(Stack(depth=2).double(), read)


def test_a_search_at_removal_time_needs_no_proof() -> None:
    model = Indexed().double()
    structures = discover(model, (X,), kinds=("layer", "ffn"))
    plan = plan_without(model, structures, "blocks.0", "blocks.3", **{"blocks.1.ffn": [3], "blocks.0.ffn": [1]})
    with silence_units(model, plan):
        expected = model(X)
    report = apply_plan(model, plan, verify=((X,), {}))
    assert error([model(X)], [expected]) < EXACT
    assert model.depth == 2  # the count that the forward reads followed
    edits = {e.attribute for s in report.plan.structures for e in s.edits if isinstance(e, AttributeEdit)}
    assert "depth" in edits
    assert [b.position for b in model.blocks] == [0, 1]  # so did the positions


def test_removal_after_removal() -> None:
    model = Stack().double()
    structures = discover(model, (X,), kinds=("layer", "ffn"), prove=True)
    first = plan_without(model, structures, "blocks.0", **{"blocks.0.ffn": [0], "blocks.2.ffn": [0, 1, 4]})
    dense, twice = copy.deepcopy(model), copy.deepcopy(model)
    apply_plan(twice, first, verify=((X,), {}))
    left = first.shrunk(structures)
    assert [s.name for s in left if s.kind == "layer"] == [f"blocks.{i}.layer" for i in (1, 2, 3)]
    assert "blocks.0.ffn" not in left.counts
    assert left.params.evaluate(left.counts) == sum(p.numel() for p in twice.parameters())
    later = plan_without(twice, left, "blocks.2", "blocks.3", **{"blocks.1.ffn": [1, 2]})
    apply_plan(twice, later, verify=((X,), {}))
    both = first.compose(later)
    assert both.kept["blocks.2.layer"] == () and both.kept["blocks.2.ffn"] == (0, 1, 4)
    apply_plan(dense, both, verify=((X,), {}))
    assert torch.equal(dense(X), twice(X))
    with pytest.raises(ValueError, match="at least one layer of a stack to stay"):
        both.compose(plan_without(dense, both.shrunk(structures), "blocks.1"))
    with pytest.raises(ValueError, match=r"'blocks\.0\.ffn' is gone"):
        plan_without(model, structures, "blocks.0").compose(PruningPlan.of(model, structures, {}))


def test_one_layer_of_a_stack_stays() -> None:
    model = Stack(depth=2).double()
    structures = discover(model, (X,), kinds="layer", prove=True)
    with pytest.raises(ValueError, match="at least one layer of a stack to stay, but all of"):
        plan_without(model, structures, "blocks.0", "blocks.1")
    alone = discover(Stack(depth=1).double(), (X,), kinds="layer")
    assert not len(alone)
    assert [p.reasons for p in alone.pinned if p.kind == "layer"] == [
        ("it is the only layer of its stack, and one must stay",)
    ]


@pytest.mark.parametrize(
    ("kind", "pinned", "reason"),
    [
        (Shared, {1, 2}, r"its 'blocks\.\d\.up\.weight' is shared with 'blocks\.\d\.up\.weight'"),
        (Recurrent, {0, 1, 2, 3}, "it is called 2 times in one pass"),
        (Making, set(), ""),
    ],
)
def test_layers_that_must_stay(kind: type[nn.Module], pinned: set[int], reason: str) -> None:
    structures = discover(kind().double(), (X,), kinds="layer")
    stay = {p.name: p.reasons for p in structures.pinned if p.kind == "layer"}
    assert stay.keys() == {f"blocks.{i}.layer" for i in pinned}
    for reasons in stay.values():
        assert len(reasons) == 1
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(reasons[0])
    assert len(structures) == 4 - len(pinned)


def test_a_layer_that_makes_what_others_need_stays() -> None:
    class Maker(PairBlock):
        def forward(self, x: Tensor, *, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None, None]:
            return super().forward(x)[0], (self.up(x).mean() if bias is None else bias), None

    class Made(Stack):
        def walk(self, x: Tensor) -> Tensor:
            bias = None
            for block in self.blocks:
                x, bias, _ = block(x, bias=bias)
            return x + bias

    structures = discover(Made(block=Maker).double(), (X,), kinds="layer", prove=True)
    assert [s.name for s in structures] == ["blocks.1.layer", "blocks.2.layer", "blocks.3.layer"]
    (stays,) = [p for p in structures.pinned if p.kind == "layer"]
    assert stays.reasons == ("item 1 of what it returns is neither an input of its nor a layer's output",)


def test_a_layer_that_the_model_cannot_do_without_stays() -> None:
    class Needed(Stack):
        """Fails where its second layer does nothing."""

        def walk(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            y = self.blocks[1](x)
            if torch.equal(x, y):
                raise ValueError("nothing was added")
            return self.blocks[3](self.blocks[2](y))

    structures = discover(Needed().double(), (X,), kinds="layer", prove=True)
    assert "blocks.1.layer" not in structures.counts and len(structures)
    (reason,) = [p.reasons[0] for p in structures.pinned if p.name == "blocks.1.layer"]
    assert reason.startswith("the model needs what it does: passed by,") and "nothing was added" in reason


def test_what_is_no_layer() -> None:
    """No residual path, a path around the module, a path without weights: nothing to pass by."""

    class Around(Stack):
        def walk(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block.down(F.gelu(block.up(x)))
            return x

    class Branch(nn.Sequential):
        def __init__(self, position: int) -> None:
            super().__init__(nn.Linear(WIDTH, WIDTH), nn.GELU())

    for model in (Around(), Stack(block=Branch), nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))):
        structures = discover(model.double(), (X,), kinds="layer")
        assert not len(structures)
        assert not [p for p in structures.pinned if p.kind == "layer"]


def test_a_layer_that_writes_into_its_input() -> None:
    model = Stack(block=InPlaceBlock).double()
    structures = discover(model, (X,), kinds="layer", prove=True)
    plan = plan_without(model, structures, "blocks.1")
    with silence_units(model, plan), torch.no_grad():
        expected = model(X)
    apply_plan(model, plan, verify=((X,), {}))
    with torch.no_grad():
        assert error([model(X)], [expected]) < EXACT


def test_nothing_is_changed_when_a_removal_fails() -> None:
    model = Stack().double()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, (X,), {})
    structures = discover(model, (X,), kinds=("layer", "ffn"), prove=True)
    plan = plan_without(model, structures, "blocks.1", **{"blocks.2.ffn": [0]})
    before = state_of(model, [optimizer])
    with pytest.raises(SurgeryError, match="does not fit together"):
        apply_plan(model, plan, [optimizer], ((X,), {}), tolerance=-1.0)
    assert state_of(model, [optimizer]) == before
    with pytest.MonkeyPatch.context() as patch:  # everything has been carried out when the last comparison fails
        patch.setattr("lightning_compress.surgery.apply.difference", lambda *_: 1.0)
        with pytest.raises(SurgeryError, match="to agree with the zeroed one within 1e-06"):
            apply_plan(model, plan, [optimizer], ((X,), {}))
    assert state_of(model, [optimizer]) == before
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(SurgeryError, match=r"LBFGS for 'blocks\.1\.norm\.weight'"):
        apply_plan(model, plan_without(model, structures, "blocks.1"), [lbfgs], ((X,), {}))
    assert state_of(model, [optimizer]) == before


def test_an_optimizer_group_may_become_empty() -> None:
    model = Stack(depth=2).double()
    rest = [p for n, p in model.named_parameters() if not n.startswith("blocks.1")]
    optimizer = torch.optim.AdamW([{"params": model.blocks[1].parameters(), "lr": 1e-3}, {"params": rest}], lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step(model, optimizer, (X,), {})
    structures = discover(model, (X,), kinds="layer", prove=True)
    apply_plan(model, plan_without(model, structures, "blocks.1"), [optimizer], ((X,), {}))
    assert [len(g["params"]) for g in optimizer.param_groups] == [0, len(rest)]
    step(model, optimizer, (X,), {})
    schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())


def test_costs_and_plans_with_kinds_mixed() -> None:
    model = Stack().double()
    structures = discover(model, (X,), kinds=("layer", "ffn"), prove=True)
    assert structures.params.evaluate(structures.counts) == sum(p.numel() for p in model.parameters())
    without = {**structures.counts, "blocks.1.layer": 0}
    per_block = sum(p.numel() for p in model.blocks[1].parameters())
    assert structures.params.evaluate(structures.counts) - structures.params.evaluate(without) == per_block
    assert structures.macs.evaluate(structures.counts) - structures.macs.evaluate(without) == 8 * 2 * WIDTH * 8
    assert kept_fraction(structures, {**without, "blocks.0.layer": 0, "blocks.2.layer": 0}, "macs") == 0.25

    with torch.no_grad():
        for p in model.blocks[2].parameters():
            p.mul_(0.01)
    plan = make_plan(model, structures, macs=0.5)
    assert 0.49 <= kept_fraction(structures, plan.counts, "macs") <= 0.5
    assert plan.kept["blocks.2.layer"] == () or plan.counts["blocks.2.ffn"] == 1
    smallest = make_plan(model, structures.of_kind("layer"), params=0.25)
    assert sum(smallest.counts.values()) == 1
    with pytest.raises(ValueError, match="smallest possible"):
        make_plan(model, structures.of_kind("layer"), params=0.2)
    with pytest.raises(ValueError, match="layers go whole or stay"):
        make_plan(model, structures, macs=0.5, per_layer=True)
    kept = make_plan(model, structures, macs=0.5, min_units={"layer": 1})
    assert all(kept.counts[f"blocks.{i}.layer"] == 1 for i in range(4))
    best = {s.name: torch.full((s.units,), 1.0) for s in structures.of_kind("layer")} | {
        "blocks.3.layer": torch.tensor([9.0])
    }
    last = make_plan(model, structures.of_kind("layer"), params=0.25, scores=best)
    assert last.kept["blocks.3.layer"] == (0,)


def test_scores_of_layers() -> None:
    model = Stack(depth=2).double()
    structures = discover(model, (X,), kinds=("layer", "ffn"))
    norms = unit_scores(model, structures)
    squares = sum(float(p.detach().square().sum()) for p in model.blocks[0].parameters())
    assert float(norms["blocks.0.layer"]) == pytest.approx(squares)
    with pytest.raises(ValueError, match="gradients for structure"):
        unit_scores(model, structures, "taylor")
    model(X).square().sum().backward()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    scaled = {n: p.detach() * scale if n.startswith("blocks.1") else p.detach() for n, p in model.named_parameters()}
    (gate,) = torch.autograd.grad(torch.func.functional_call(model, scaled, (X,)).square().sum(), scale)
    taylor = unit_scores(model, structures, "taylor")
    assert float(taylor["blocks.1.layer"]) == pytest.approx(float(gate**2), rel=1e-5)


def test_zeros_alone_do_not_silence_a_layer() -> None:
    model = Stack().double()
    structures = discover(model, (X,), kinds=("layer", "ffn"), prove=True)
    plan = plan_without(model, structures, "blocks.1", **{"blocks.2.ffn": [0]})
    before = state_of(model)
    with pytest.raises(SurgeryError, match=r"'blocks.1.layer' \(layer\) also need a mask. Use silence_units"):
        zero_units(model, plan)
    masks = silence_units(model, plan)
    with pytest.raises(SurgeryError, match="passed by already"):
        silence_units(model, plan)
    assert not model.blocks[2].down.weight[:, 1:].any()
    masks.remove()
    assert state_of(model) == before
    zero_units(model, PruningPlan.of(model, structures, {"blocks.2.ffn": [0]}))


def test_a_call_of_another_form_says_so() -> None:
    skip = Skip(Passage("dict", ("x", None), ("y", "z")))
    assert skip(x=1) == {"y": 1, "z": None} and "dict of ['x', None]" in repr(skip)
    with pytest.raises(
        TypeError, match="a call with the input 'x', as when the module was traced, but got 1 positional"
    ):
        skip(1)
    assert Skip(Passage("list", (1, 0)))(3, 4) == [4, 3]


def test_a_list_with_gaps() -> None:
    layers = [nn.Linear(i + 1, 1) for i in range(4)]
    gapped = nn.ModuleList(layers)
    del gapped._modules["1"]
    gapped.__class__ = GappedList
    assert [m.in_features for m in gapped] == [1, 3, 4] and len(gapped) == 3
    assert gapped[1] is layers[2] and gapped[-1] is layers[3] and list(gapped[1:]) == layers[2:]
    gapped.append(layers[1])
    gapped[0] = layers[1]
    assert list(gapped._modules) == ["0", "2", "3", "4"]
    del gapped[1]
    gapped.extend([layers[0]])
    assert list(gapped._modules) == ["0", "3", "4", "5"]
    with pytest.raises(NotImplementedError, match="members of a list with gaps to be appended"):
        gapped.insert(0, layers[0])


def test_the_outermost_stack_counts() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(Block(), Block())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = nn.Sequential(nn.Linear(5, WIDTH), Outer(), Outer(), Outer(), nn.Linear(WIDTH, 3)).double()
    assert [s.name for s in discover(model, (X,), kinds="layer")] == ["1.layer", "2.layer", "3.layer"]
    single = nn.Sequential(nn.Linear(5, WIDTH), Outer(), nn.Linear(WIDTH, 3)).double()
    assert [s.name for s in discover(single, (X,), kinds="layer")] == ["1.inner.0.layer", "1.inner.1.layer"]
    assert "native" in str(explain(single, (X,), kinds="layer"))


FAMILIES = ["nn.TransformerEncoder", "nn.Transformer", "ResNet", "BERT", "GPT-2", "Llama", "T5", "ViT", "Swin"]


@pytest.mark.parametrize("name", FAMILIES)
def test_passed_by_equals_removed_in_families(name: str) -> None:
    """A layer and, at the same time, half of every family of units."""
    example = MODELS[name]
    model = example.model().double()
    args, kwargs = double(example.args), double(example.kwargs or {})
    structures = discover(model, args, kwargs, kinds=("layer", "head", "ffn", "channel"), prove=True)
    layers = [s for s in structures if s.kind == "layer"]
    assert layers
    gone = layers[-1 if name == "ResNet" else 0].name
    kept = {s.name: range(0, s.units, 2) for s in structures if s.kind != "layer"}
    plan = PruningPlan.of(model, structures, {**kept, gone: ()})
    small = copy.deepcopy(model)
    report = apply_plan(small, plan, verify=(args, kwargs))
    assert report.error is not None and report.error < EXACT
    with silence_units(model, plan):
        assert error(call(small, args, kwargs), call(model, args, kwargs)) < EXACT
        elsewhere = other_batch(example)
        assert error(call(small, *elsewhere), call(model, *elsewhere)) < EXACT
    assert structures.params.evaluate(report.plan.counts) == sum(p.numel() for p in small.parameters())
    replay = copy.deepcopy(model)
    apply_plan(replay, PruningPlan.from_json(report.plan.to_json()))
    assert error(call(replay, args, kwargs), call(small, args, kwargs)) < EXACT


def test_generation_with_a_cache_after_the_first_layer_is_gone() -> None:
    model = MODELS["Llama"].model()
    structures = discover(model, (), CAUSAL_CALL, kinds="layer", prove=True)
    apply_plan(model, plan_without(model, structures, "model.layers.0"), verify=((), CAUSAL_CALL))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(TEXT_CALL["input_ids"], use_cache=c, **settings) for c in (True, False))
    assert torch.equal(cached, plain)
