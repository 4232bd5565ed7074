"""What one traced pass finds in real models, and that it leaves them as they were."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.discovery import trace_structures
from lightning_compress.discovery.tracer import decomposed
from tests.zoo import FFN, HEADS, MODELS, WIDTH

D = WIDTH // HEADS

# (kind, units) -> how many structures of it
EXPECTED: dict[str, dict[tuple[str, int], int]] = {
    "BERT": {
        ("head", 5): 2,
        ("qk_dim", 12): 2,
        ("vo_dim", 12): 2,
        ("ffn", FFN): 2,
        ("ffn", WIDTH): 1,
    },  # the pooler is an FFN unit too
    "RoBERTa": {("head", 5): 2, ("qk_dim", 12): 2, ("vo_dim", 12): 2, ("ffn", FFN): 2, ("ffn", WIDTH): 1},
    "DistilBERT": {("head", 5): 2, ("qk_dim", 12): 2, ("vo_dim", 12): 2, ("ffn", FFN): 2, ("ffn", WIDTH): 1},
    "GPT-2": {("head", 5): 2, ("qk_dim", 12): 2, ("vo_dim", 12): 2, ("ffn", FFN): 2},
    # 2 key-value groups x 2 queries in each of 2 layers; rotary pairs are one structure for all layers
    "Llama": {("head", 2): 4, ("qk_dim", 8): 1, ("vo_dim", 16): 2, ("ffn", FFN): 2},
    # heads are coupled over the layers of a stack by the relative position table
    "T5": {("head", 5): 3, ("qk_dim", 14): 6, ("vo_dim", 14): 6, ("ffn", FFN): 4},
    "BART": {("head", 5): 6, ("qk_dim", 12): 6, ("vo_dim", 12): 6, ("ffn", FFN): 4},
    "ViT": {("head", 5): 2, ("qk_dim", 12): 2, ("vo_dim", 12): 2, ("ffn", FFN): 2},
    "Swin": {("head", 2): 2, ("head", 4): 2, ("qk_dim", 12): 4, ("vo_dim", 12): 4, ("ffn", 96): 2, ("ffn", 192): 2},
    "nn.TransformerEncoder": {("head", 5): 2, ("qk_dim", D): 2, ("vo_dim", D): 2, ("ffn", FFN): 2},
    "nn.Transformer": {("head", 5): 6, ("qk_dim", D): 6, ("vo_dim", D): 6, ("ffn", FFN): 4},
    "nn.MultiheadAttention": {("head", 5): 1, ("qk_dim", D): 1, ("vo_dim", D): 1, ("ffn", FFN): 1},
    "packed attention, literal sizes": {("head", 5): 1, ("qk_dim", D): 1, ("vo_dim", D): 1},
    "packed attention": {("head", 5): 1, ("qk_dim", D): 1, ("vo_dim", D): 1},
    "separate attention": {("head", 5): 1, ("qk_dim", D): 1, ("vo_dim", D): 1},
    "MLP": {("ffn", 50): 1, ("ffn", 40): 1},
    "ResNet": {("channel", 18): 2, ("channel", 26): 3},
    "depthwise CNN": {("channel", 36): 1, ("channel", 6): 1, ("channel", 8): 1, ("channel", 3): 1},
    "LSTM": {("ffn", 22): 1, ("ffn", 30): 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_structures_of(name):
    example = MODELS[name]
    structures = trace_structures(example.model(), example.args, example.kwargs)
    assert Counter((s.kind, s.units) for s in structures) == EXPECTED[name]


@pytest.mark.parametrize("name", MODELS)
def test_costs_are_those_of_the_model(name):
    """Parameters by counting them, MACs against torch's own counter of the same call."""
    example = MODELS[name]
    model = example.model()
    structures = trace_structures(model, example.args, example.kwargs)
    assert structures.params.evaluate(structures.counts) == sum(p.numel() for p in model.parameters())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), decomposed(), counter:
        model(*example.args, **(example.kwargs or {}))
    assert structures.macs.evaluate(structures.counts) == counter.get_total_flops() / 2


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "nn.Transformer", "ResNet"])
def test_params_polynomial_counts_what_is_left_after_removal(name):
    """Half of every structure goes: the polynomial agrees with counting the positions that remain."""
    example = MODELS[name]
    model = example.model()
    structures = trace_structures(model, example.args, example.kwargs)
    masks = {n: [torch.ones(size, dtype=torch.bool) for size in p.shape] for n, p in model.named_parameters()}
    counts = {}
    for structure in structures:
        counts[structure.name] = structure.units - structure.units // 2
        for s in structure.slices:
            if s.parameter in masks:
                masks[s.parameter][s.axis][s.positions(range(structure.units // 2))] = False
    left = sum(int(torch.tensor([int(m.sum()) for m in dims]).prod()) for dims in masks.values())
    assert structures.params.evaluate(counts) == left


@pytest.mark.parametrize("name", ["BERT", "ResNet", "LSTM"])
def test_the_model_is_left_as_it_was(name):
    example = MODELS[name]
    model = example.model().train()
    model.get_submodule(next(n for n, _ in model.named_children())).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    trace_structures(model, example.args, example.kwargs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_a_module_remembers_of_the_pass_is_forgotten():
    def forward(s, x):
        s.state = s.a(x) + (s.state if hasattr(s, "state") else 0)
        return s.b(s.state)

    model = Lambda(forward, a=A(), b=B())
    model.last = None
    trace_structures(model, (ROWS,))
    assert not hasattr(model, "state") and model.last is None


def test_structures_do_not_depend_on_the_batch_or_the_mode():
    example = MODELS["BERT"]
    model = example.model()
    reference = trace_structures(model, example.args, example.kwargs)
    other = trace_structures(model.train(), (torch.randint(3, 99, (8, 8)),))
    assert [(s.name, s.kind, s.units, s.slices) for s in reference] == [
        (s.name, s.kind, s.units, s.slices) for s in other
    ]


def test_equal_sizes_everywhere_confuse_nothing():
    """heads = head_dim = batch = tokens = 8 and hidden = ffn = vocabulary = 64."""
    import transformers

    config = transformers.BertConfig(
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=8,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=64,
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    structures = trace_structures(model, (torch.randint(3, 60, (8, 8)),))
    assert Counter(s.kind for s in structures) == {"head": 2, "qk_dim": 2, "vo_dim": 2, "ffn": 2}
    layer = "encoder.layer.0.attention.self"
    for structure in structures:
        if structure.kind == "qk_dim" and structure.name.startswith("encoder.layer.0"):
            assert set(structure.parameters) == {
                f"{layer}.{p}.{t}" for p in ("query", "key") for t in ("weight", "bias")
            }


def test_only_the_kinds_asked_for_are_variables():
    example = MODELS["BERT"]
    structures = trace_structures(example.model(), example.args, example.kwargs, kinds=("head", "ffn"))
    assert {s.kind for s in structures} == {"head", "ffn"}
    assert structures.macs.variables == {s.name for s in structures}


def test_silencing_slices_are_consumers_or_both_producers_of_scores():
    example = MODELS["separate attention"]
    by_kind = {s.kind: s for s in trace_structures(example.model(), example.args)}
    silent = {kind: {s.parameter for s in structure.slices if s.zero} for kind, structure in by_kind.items()}
    assert silent["head"] == silent["vo_dim"] == {"body.out.weight"}
    assert silent["qk_dim"] == {f"body.{p}.{t}" for p in ("query", "key") for t in ("weight", "bias")}


class Lambda(nn.Module):
    """A forward written in place."""

    def __init__(self, forward, **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args):
        return self.function(self, *args)


A, B, C = (lambda: nn.Linear(21, 50)), (lambda: nn.Linear(50, 7)), (lambda: nn.Conv2d(3, 24, 3, 1, 1))
ROWS = torch.randn(6, 21)
PIXELS = torch.randn(2, 3, 16, 16)

ORDER = torch.tensor([4, 0, 8, 2, 2, 1])

# Hostile or unusual modules: what is free in them.
FREE = {
    "gated halves": (Lambda(lambda s, x: s.b(F.glu(s.a(x))), a=A(), b=nn.Linear(25, 7)), ROWS, {("ffn", 25): 1}),
    "unit norm": (Lambda(lambda s, x: s.b(F.normalize(s.a(x))), a=A(), b=B()), ROWS, {("ffn", 50): 1}),
    "gates in a buffer": (
        Lambda(lambda s, x: s.b(s.a(x) * s.g.running_mean), a=A(), b=B(), g=nn.BatchNorm1d(50)),
        ROWS,
        {("ffn", 50): 1},
    ),
    "layer applied twice": (
        Lambda(lambda s, x: s.b(s.r(F.relu(s.r(F.relu(s.a(x)))))), a=A(), r=nn.Linear(50, 50), b=B()),
        ROWS,
        {("ffn", 50): 1},
    ),
    "channel shuffle": (
        Lambda(
            lambda s, x: s.f(s.d(s.c(x).view(-1, 3, 8, 16, 16).transpose(1, 2).flatten(1, 2)).mean((2, 3))),
            c=C(),
            d=nn.Conv2d(24, 18, 3, 1, 1),
            f=nn.Linear(18, 7),
        ),
        PIXELS,
        {("channel", 3): 1, ("channel", 8): 1, ("channel", 18): 1},
    ),
    "squeeze and excite": (
        Lambda(
            lambda s, x: (
                lambda h: s.f((h * s.up(F.relu(s.down(h.mean((2, 3), keepdim=True)))).sigmoid()).mean((2, 3)))
            )(s.c(x)),
            c=C(),
            down=nn.Conv2d(24, 6, 1),
            up=nn.Conv2d(6, 24, 1),
            f=nn.Linear(24, 7),
        ),
        PIXELS,
        {("channel", 24): 1, ("channel", 6): 1},
    ),
    "transposed convolution": (
        Lambda(
            lambda s, x: s.f(s.t(F.relu(s.c(x))).mean((2, 3))),
            c=C(),
            t=nn.ConvTranspose2d(24, 18, 2, 2),
            f=nn.Linear(18, 7),
        ),
        PIXELS,
        {("channel", 24): 1, ("channel", 18): 1},
    ),
    "pixel shuffle": (
        Lambda(lambda s, x: s.f(F.pixel_shuffle(s.c(x), 2).mean((2, 3))), c=C(), f=nn.Linear(6, 7)),
        PIXELS,
        {("channel", 6): 1},
    ),
    "shuffle in one operation": (
        Lambda(
            lambda s, x: s.f(s.d(F.channel_shuffle(s.c(x), 3)).mean((2, 3))),
            c=C(),
            d=nn.Conv2d(24, 18, 3, 1, 1),
            f=nn.Linear(18, 7),
        ),
        PIXELS,
        {("channel", 3): 1, ("channel", 8): 1, ("channel", 18): 1},
    ),
    "rows written where a mask says": (
        Lambda(
            lambda s, x: s.b(s.a(x).masked_scatter((x[:, :1] > 0).expand(-1, 50), s.c(x))),
            a=A(),
            b=B(),
            c=A(),
        ),
        ROWS,
        {("ffn", 50): 1},
    ),
    "convolution flattened": (
        Lambda(lambda s, x: s.f(F.relu(s.c(x)).flatten(1)), c=nn.Conv2d(3, 24, 3, 4, 1), f=nn.Linear(24 * 16, 7)),
        PIXELS,
        {("channel", 24): 1},
    ),
    "gated recurrent unit": (
        Lambda(
            lambda s, x: s.b(s.g(x.unsqueeze(0))[0].mean(1)), g=nn.GRU(21, 30, batch_first=True), b=nn.Linear(30, 7)
        ),
        ROWS,
        {("ffn", 30): 1},
    ),
    "learned slopes": (
        Lambda(lambda s, x: s.b(s.p(s.a(x))), a=A(), p=nn.PReLU(50), b=B()),
        ROWS,
        {("ffn", 50): 1},
    ),
    "last positions taken": (  # the last but one by a list, the last as a number
        Lambda(
            lambda s, x: (lambda h: s.b(h[:, :-2]) + h[:, [-2]] * h[:, -1:])(s.a(x)),
            a=nn.Linear(21, 52),
            b=B(),
        ),
        ROWS,
        {("ffn", 50): 1},
    ),
    "overlapping windows": (  # (channels, 6 rows) as 5 windows of 2 rows
        Lambda(lambda s, x: s.b(s.a(x).as_strided((5, 2, 50), (50, 50, 1)).amax(1)), a=A(), b=B()),
        ROWS,
        {("ffn", 50): 1},
    ),
    "windows of an image": (
        Lambda(
            lambda s, x: s.f(F.fold(F.unfold(s.c(x), 3, padding=1), 16, 3, padding=1).mean((2, 3))),
            c=C(),
            f=nn.Linear(24, 7),
        ),
        PIXELS,
        {("channel", 24): 1},
    ),
    "scattered rows": (
        Lambda(lambda s, x: s.b(torch.zeros(9, 50).scatter_add(0, ORDER[:, None].expand(6, 50), s.a(x))), a=A(), b=B()),
        ROWS,
        {("ffn", 50): 1},
    ),
    "weight normalisation": (
        Lambda(lambda s, x: s.b(F.relu(s.a(x))), a=nn.utils.parametrizations.weight_norm(nn.Linear(21, 50)), b=B()),
        ROWS,
        {("ffn", 50): 1},
    ),
}


class Experts(nn.Module):
    """Rows sorted by their expert, then one grouped product per layer of all experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 2 * width, 16)), nn.Parameter(torch.randn(3, 16, width))

    def forward(self, x):
        offs = torch.tensor([2, 3, 6], dtype=torch.int32)
        a, b = F.grouped_mm(x, self.up.mT, offs=offs).chunk(2, -1)
        return F.grouped_mm(F.silu(a) * b, self.down.mT, offs=offs)


@pytest.mark.parametrize(("width", "units", "positions"), [(24, 6, 4), (64, 8, 8)])
def test_experts_lose_whole_lines_of_memory(width, units, positions):
    """The kernel of a grouped product takes no other widths."""
    model = nn.Sequential(nn.Linear(5, 16), Experts(width), nn.Linear(16, 7))
    (structure,) = (s for s in trace_structures(model, (torch.randn(6, 5),)) if s.parameters == ("1.up", "1.down"))
    assert structure.units == units
    assert [tuple(piece.indices.shape) for piece in structure.slices] == [(units, 2 * positions), (units, positions)]


def test_what_the_model_returns_for_itself_pins_nothing():
    """A key/value cache shrinks with the model; but where an object is all that is returned, it is the output."""
    cached = Lambda(lambda s, x: (s.b(h := s.a(x)), SimpleNamespace(keys=h)), a=A(), b=B())
    assert [s.units for s in trace_structures(cached, (ROWS,))] == [50]
    wrapped = Lambda(lambda s, x: SimpleNamespace(logits=s.b(s.a(x)), hidden=s.a(x)), a=A(), b=B())
    assert trace_structures(wrapped, (ROWS,)) == []


@pytest.mark.parametrize("name", FREE)
def test_free_in(name):
    model, x, expected = FREE[name]
    assert Counter((s.kind, s.units) for s in trace_structures(model, (x,))) == expected


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_parts_are_seen_through_and_stay_whole():
    scripted = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Linear(50, 40)))
    model = Lambda(lambda s, x: s.b(s.j(s.a(x))), a=A(), j=scripted, b=nn.Linear(40, 7))
    found = trace_structures(model, (ROWS,))
    assert list(found) == []
    reason = "it belongs to a scripted module: remove units from the eager one and script it then"
    assert [p.units for p in found.pinned if reason in p.reasons] == [50, 40]


# What must stay whole, and the reason that the user reads.
WHOLE = {
    "softmax over units": (
        lambda s, x: s.b(s.a(x).softmax(-1)),
        "its positions depend on each other in softmax (_softmax)",
    ),
    "mean gate": (lambda s, x: s.b(s.a(x) * s.a(x).mean(-1, keepdim=True)), "it is reduced over by mean (mean)"),
    "fixed permutation": (
        lambda s, x: s.b(s.a(x)[:, torch.arange(49, -1, -1)]),
        "its positions are looked up by index (index)",
    ),
    "constant gates": (lambda s, x: s.b(s.a(x) * torch.linspace(0, 1, 50)), "it is made of constants (linspace)"),
    "gates from outside": (
        lambda s, x: s.b(s.a(x) * OUTSIDE),
        "it comes from a tensor made outside the traced operations (mul)",
    ),
    "windows over units": (
        lambda s, x: s.b(s.a(x).as_strided((5, 50, 2), (50, 1, 1))[..., 0]),
        "it is viewed by strides (as_strided)",
    ),
    "units scattered": (
        lambda s, x: s.b(torch.zeros(6, 50).scatter(1, torch.zeros(6, 50, dtype=torch.long), s.a(x))),
        "its positions are looked up by index (scatter)",
    ),
    "single unit read": (lambda s, x: s.b(s.a(x)) * s.a(x)[0, 0], "single positions of it are taken by index (select)"),
    "sorted": (lambda s, x: s.b(s.a(x).sort(-1)[0]), "its positions depend on each other in sort (sort)"),
    "unknown operation": (
        lambda s, x: s.b(s.a(x).renorm(2, 1, 5.0)),
        "it passes through renorm, which has no rule (renorm)",
    ),
    "returned": (lambda s, x: (s.b(F.relu(s.a(x))), s.a(x)), "it is returned by the model"),
}
OUTSIDE = torch.rand(50)


@pytest.mark.parametrize("name", WHOLE)
def test_stays_whole(name):
    function, reason = WHOLE[name]
    structures = trace_structures(Lambda(function, a=A(), b=B()), (ROWS,))
    assert [s for s in structures if s.units == 50] == []
    (pinned,) = (p for p in structures.pinned if p.units == 50)
    assert pinned.parameters[:2] == ("a.weight", "a.bias")
    assert reason in pinned.reasons


def test_normalised_queries_are_queries():
    """Their dims stay whole, and the reason is found under Q/K dims."""
    model = Lambda(
        lambda s, x: s.b(F.layer_norm(s.a(x), (50,)) @ F.layer_norm(s.k(x), (50,)).mT), a=A(), k=A(), b=nn.Linear(6, 7)
    )
    (pinned,) = (p for p in trace_structures(model, (ROWS,)).pinned if p.units == 50)
    assert pinned.kind == "qk_dim" and "it is normalised over (native_layer_norm)" in pinned.reasons


def test_what_nobody_uses_pins_nothing():
    """The attention weights, averaged over the heads, that nn.MultiheadAttention returns by default."""

    class Attend(nn.Module):
        def __init__(self, use: bool) -> None:
            super().__init__()
            self.attention, self.out, self.use = nn.MultiheadAttention(20, 4, batch_first=True), nn.Linear(20, 3), use

        def forward(self, x):
            mixed, weights = self.attention(x, x, x)
            return self.out(mixed) + (weights.mean() if self.use else 0)

    x = torch.randn(2, 5, 20)
    assert "head" in {s.kind for s in trace_structures(Attend(use=False), (x,))}
    used = trace_structures(Attend(use=True), (x,))
    assert "head" not in {s.kind for s in used}
    assert any("reduced over by mean" in r for p in used.pinned for r in p.reasons)


def test_what_is_written_in_place_counts_as_used():
    def forward(s, x):
        out = torch.zeros(6, 7)
        out[:] = s.a(x).mean(-1, keepdim=True)
        return out + s.b(F.relu(s.a(x)))

    structures = trace_structures(Lambda(forward, a=A(), b=B()), (ROWS,))
    assert not [s for s in structures if s.units == 50]


def test_reasons_name_the_module():
    example = MODELS["BERT"]
    structures = trace_structures(example.model(), example.args, example.kwargs)
    (hidden,) = (p for p in structures.pinned if p.kind == "hidden")
    assert "it is normalised over (native_layer_norm in bert.encoder.layer.1.output.LayerNorm)" in hidden.reasons


def test_tied_weights_are_one_parameter():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(21, 50, bias=False), nn.Linear(50, 21, bias=False)
            self.down.weight = nn.Parameter(self.up.weight.detach().t().contiguous())
            self.again = nn.Linear(21, 50, bias=False)
            self.again.weight = self.up.weight

        def forward(self, x):
            return self.down(F.relu(self.up(x) + self.again(x)))

    (structure,) = trace_structures(Tied(), (ROWS,))
    assert structure.parameters == ("up.weight", "down.weight")


def test_unknown_kind_is_refused_with_what_was_meant():
    with pytest.raises(ValueError, match=r"Expected kinds to be among .* but got 'heads'. Did you mean 'head'\?"):
        trace_structures(nn.Linear(2, 2), (torch.randn(1, 2),), kinds=("heads",))


def test_meta_tensors_are_enough():
    """No memory is needed to discover: the same structures on the meta device."""
    example = MODELS["nn.TransformerEncoder"]
    with torch.device("meta"):
        model = example.build()
        x = torch.randn(2, 9, 21)
    found = trace_structures(model, (x,))
    assert Counter((s.kind, s.units) for s in found) == EXPECTED["nn.TransformerEncoder"]
