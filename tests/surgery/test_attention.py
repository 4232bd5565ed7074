"""A slim attention is the original until something is sliced, and the original with zeros after that."""

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_compress.surgery.attention import SlimMultiheadAttention, resize, sizes, slim_, unslim_

EMBED, HEADS, WIDTH = 12, 3, 4  # an odd number of heads keeps the fused kernels of the original out; EVEN lets them in
EVEN = 2
BATCH, TARGETS, SOURCES = 2, 4, 5

OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "kdim_vdim": {"kdim": 7, "vdim": 9},
    "kdim": {"kdim": 7, "batch_first": True},
    "all": {"kdim": 7, "vdim": 9, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "all_without_bias": {"bias": False, "add_bias_kv": True, "add_zero_attn": True},
}
# (key padding mask, attention mask)
MASKS = {
    "none": (None, None),
    "padding": ("bool", None),
    "float_padding": ("float", None),
    "flat": (None, "bool"),
    "float_flat": (None, "float"),
    "per_head": (None, "bool_per_head"),
    "float_per_head": (None, "float_per_head"),
    "both": ("bool", "bool"),
    "float_both": ("float", "float_per_head"),
}


def make(heads: int = HEADS, **options: Any) -> nn.MultiheadAttention:
    """In float64, with no zero among its parameters (torch starts the biases at zero)."""
    attention = nn.MultiheadAttention(EMBED, heads, **options).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return attention


def slimmed(attention: nn.MultiheadAttention) -> SlimMultiheadAttention:
    slim = copy.deepcopy(attention)
    slim_(slim)
    assert isinstance(slim, SlimMultiheadAttention)
    return slim


def inputs(
    attention: nn.MultiheadAttention, form: str = "cross", batched: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; "self": one tensor, "memory": key is value, "cross": three tensors."""
    sources = TARGETS if form == "self" else SOURCES

    def tensor(length: int, features: int) -> Tensor:
        shape = ((BATCH, length) if attention.batch_first else (length, BATCH)) if batched else (length,)
        return torch.randn(*shape, features, dtype=torch.float64, requires_grad=True)

    query = tensor(TARGETS, EMBED)
    key = query if form == "self" else tensor(sources, attention.kdim)
    return query, key, tensor(sources, attention.vdim) if form == "cross" else key


def mask(kind: str | None, *shape: int) -> Tensor | None:
    """Boolean or float; the first source stays visible, so that no target sees nothing."""
    if kind is None:
        return None
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    return (
        hidden if kind.startswith("bool") else torch.randn(shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    )


def masks(name: str, heads: int, sources: int, batched: bool = True) -> dict[str, Tensor | None]:
    padding, attention = MASKS[name]
    batch = BATCH if batched else 1
    leading = (batch * heads,) if attention is not None and attention.endswith("per_head") else ()
    return {
        "key_padding_mask": mask(padding, *((batch, sources) if batched else (sources,))),
        "attn_mask": mask(attention, *leading, TARGETS, sources),
    }


def assert_same(one: Any, other: Any, tolerance: float = 1e-12) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(b, a, rtol=0, atol=tolerance, equal_nan=True)


class TestBeforeSlicing:
    """The equality battery: original and conversion, float64, 1e-12."""

    @pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
    @pytest.mark.parametrize("masked", MASKS)
    @pytest.mark.parametrize("options", OPTIONS)
    def test_same_outputs_and_gradients(self, options: str, masked: str, batched: bool) -> None:
        original = make(**OPTIONS[options])
        slim = slimmed(original)
        same_width = original.kdim == original.vdim == EMBED
        for form in ("cross", "memory", "self") if same_width else ("cross",):
            arguments = inputs(original, form, batched)
            extra = masks(masked, HEADS, TARGETS if form == "self" else SOURCES, batched)
            for need_weights, average in ((False, True), (True, True), (True, False)):
                results, gradients = [], []
                for attention in (original, slim):
                    result = attention(*arguments, **extra, need_weights=need_weights, average_attn_weights=average)
                    leaves = [*attention.parameters(), *dict.fromkeys(arguments)]
                    loss = (result[0] ** 2).sum() + (0.0 if result[1] is None else (result[1] ** 3).sum())
                    results.append(result)
                    gradients.append(torch.autograd.grad(loss, leaves))
                assert_same(*results)
                assert_same(*gradients, tolerance=1e-11)

    @pytest.mark.parametrize("masked", ["none", "padding", "flat", "per_head", "both"])
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_same_as_the_fused_inference_kernel(self, masked: str, need_weights: bool) -> None:
        original = make(EVEN, batch_first=True).eval()
        (x, _, _), extra = inputs(original, "self"), masks(masked, EVEN, TARGETS)
        with torch.no_grad():
            expected = original(x, x, x, **extra, need_weights=need_weights)
            assert_same(expected, slimmed(original)(x, x, x, **extra, need_weights=need_weights))

    @pytest.mark.parametrize("options", ["plain", "batch_first", "bias_kv", "zero_attn"])
    @pytest.mark.parametrize("masked", ["none", "padding"])
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_same_with_the_causal_hint(self, options: str, masked: str, need_weights: bool) -> None:
        original = make(**OPTIONS[options])
        arguments, extra = inputs(original, "self"), masks(masked, HEADS, TARGETS)
        extra["attn_mask"] = torch.ones(TARGETS, TARGETS, dtype=torch.bool).triu(1)
        expected = original(*arguments, **extra, need_weights=need_weights, is_causal=True)
        assert_same(expected, slimmed(original)(*arguments, **extra, need_weights=need_weights, is_causal=True))

    @pytest.mark.parametrize("need_weights", [False, True])
    def test_same_for_targets_that_see_nothing(self, need_weights: bool) -> None:
        original = make(batch_first=True)
        arguments = inputs(original)
        padding = torch.zeros(BATCH, SOURCES, dtype=torch.bool)
        padding[1] = True
        expected = original(*arguments, key_padding_mask=padding, need_weights=need_weights)
        assert_same(expected, slimmed(original)(*arguments, key_padding_mask=padding, need_weights=need_weights))
        assert expected[0][1].isnan().any() == need_weights

    @pytest.mark.parametrize("options", ["plain", "all"])
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_same_dropout_for_the_same_seed(self, options: str, need_weights: bool) -> None:
        original = make(dropout=0.5, **OPTIONS[options])
        slim, arguments, results = slimmed(original), inputs(original), []
        for attention in (original, slim):
            torch.manual_seed(1)
            results.append(attention(*arguments, need_weights=need_weights))
        assert_same(*results)
        assert not torch.equal(slim(*arguments, need_weights=need_weights)[0], results[1][0])
        original.eval(), slim.eval()
        assert_same(*(attention(*arguments, need_weights=need_weights) for attention in (original, slim)))
        assert_same(*(slim(*arguments, need_weights=need_weights) for _ in range(2)), tolerance=0)

    @pytest.mark.parametrize("options", ["plain", "all"])
    @pytest.mark.parametrize("masked", ["none", "both", "float_both"])
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_same_under_autocast(self, options: str, masked: str, need_weights: bool) -> None:
        original = make(**OPTIONS[options]).float()
        arguments = [x.detach().float() for x in inputs(original)]
        extra = {
            name: value.float() if value is not None and value.is_floating_point() else value
            for name, value in masks(masked, HEADS, SOURCES).items()
        }
        with torch.autocast("cpu", torch.bfloat16):
            expected = original(*arguments, **extra, need_weights=need_weights)
            result = slimmed(original)(*arguments, **extra, need_weights=need_weights)
        assert expected[0].dtype == torch.bfloat16
        assert_same(expected, result, tolerance=0.02 * expected[0].abs().max().item())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_same_in_lower_precision(self, dtype: torch.dtype) -> None:
        original = make().to(dtype)
        arguments = [x.detach().to(dtype) for x in inputs(original)]
        tolerance = 20 * torch.finfo(dtype).eps
        for need_weights in (False, True):
            results = [attention(*arguments, need_weights=need_weights) for attention in (original, slimmed(original))]
            assert_same(*results, tolerance=tolerance)


def rows(heads: list[int], dims: list[int], total: int = HEADS) -> list[int]:
    """Positions of ``dims`` of ``heads`` among all; written out, as an independent reference."""
    width = EMBED // total
    return [h * width + d for h in range(total) for d in range(width) if h in heads and d in dims]


def cut(
    attention: SlimMultiheadAttention, heads: list[int], qk: list[int], vo: list[int], total: int = HEADS
) -> SlimMultiheadAttention:
    """Keep these heads, and of each these query/key dims and value/output dims."""
    qk_rows, vo_rows = rows(heads, qk, total), rows(heads, vo, total)
    packed = qk_rows + [EMBED + i for i in qk_rows] + [2 * EMBED + i for i in vo_rows]
    kept = {
        "in_proj_weight": (0, packed),
        "in_proj_bias": (0, packed),
        "q_proj_weight": (0, qk_rows),
        "k_proj_weight": (0, qk_rows),
        "v_proj_weight": (0, vo_rows),
        "bias_k": (2, qk_rows),
        "bias_v": (2, vo_rows),
        "out_proj.weight": (1, vo_rows),
    }
    for name, parameter in attention.named_parameters():
        if name in kept:
            axis, positions = kept[name]
            parameter.data = parameter.data.index_select(axis, torch.tensor(positions))
    resize(attention, len(heads), len(qk), len(vo))
    return attention


def silence(
    attention: nn.MultiheadAttention, heads: list[int], qk: list[int], vo: list[int], total: int = HEADS
) -> nn.MultiheadAttention:
    """As ``cut``, by zeros: rows of K and Q for query/key dims, columns of the output projection for the rest."""
    gone_qk = sorted(set(range(EMBED)) - set(rows(list(range(total)), qk, total)))
    gone_vo = sorted(set(range(EMBED)) - set(rows(heads, vo, total)))
    with torch.no_grad():
        if attention.in_proj_weight is not None:
            attention.in_proj_weight[gone_qk] = 0
            attention.in_proj_weight[[EMBED + i for i in gone_qk]] = 0
        else:
            attention.q_proj_weight[gone_qk] = 0
            attention.k_proj_weight[gone_qk] = 0
        if attention.in_proj_bias is not None:
            attention.in_proj_bias[gone_qk] = 0
        if attention.bias_k is not None:
            attention.bias_k[..., gone_qk] = 0
        attention.out_proj.weight[:, gone_vo] = 0
    return attention


ALL = list(range(WIDTH))
REMOVALS = {
    "one_head": ([0, 2], ALL, ALL),
    "all_heads_but_one": ([1], ALL, ALL),
    "qk_dims": ([0, 1, 2], [0, 2, 3], ALL),
    "vo_dims": ([0, 1, 2], ALL, [1, 3]),
    "all_qk_dims_but_one": ([0, 1, 2], [3], ALL),
    "all_vo_dims_but_one": ([0, 1, 2], ALL, [0]),
    "wider_values": ([0, 2], [1], [0, 1, 3]),
    "wider_keys": ([0, 2], [0, 1, 3], [2]),
}


class TestAfterSlicing:
    """The theorem: the original with the units zeroed equals the slim attention without them."""

    @pytest.mark.parametrize("removal", REMOVALS)
    @pytest.mark.parametrize("options", OPTIONS)
    def test_zeroed_equals_sliced(self, options: str, removal: str) -> None:
        original = make(**OPTIONS[options])
        small = cut(slimmed(original), *REMOVALS[removal])
        zeroed = silence(original, *REMOVALS[removal])
        kept_heads = REMOVALS[removal][0]
        same_width = original.kdim == original.vdim == EMBED
        for form in ("cross", "memory", "self") if same_width else ("cross",):
            arguments = inputs(original, form)
            for masked in MASKS:
                extra = masks(masked, HEADS, TARGETS if form == "self" else SOURCES)
                fewer = dict(extra)
                if extra["attn_mask"] is not None and extra["attn_mask"].dim() == 3:
                    per_head = extra["attn_mask"].unflatten(0, (BATCH, HEADS))
                    fewer["attn_mask"] = per_head[:, kept_heads].flatten(0, 1)
                expected, _ = zeroed(*arguments, **extra, need_weights=False)
                result, none = small(*arguments, **fewer, need_weights=False)
                assert none is None
                torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
                expected, weights = zeroed(*arguments, **extra, average_attn_weights=False)
                result, fewer_weights = small(*arguments, **fewer, average_attn_weights=False)
                torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
                torch.testing.assert_close(fewer_weights, weights[:, kept_heads], rtol=0, atol=1e-12)

    def test_the_scale_is_that_of_the_original(self) -> None:
        small = cut(slimmed(make()), [0, 2], [1], [0, 1])
        assert small.scale == 1 / WIDTH**0.5

    @pytest.mark.parametrize("removal", REMOVALS)
    def test_fused_kernel_gets_equal_widths_and_plain_kernel_true_ones(
        self, removal: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small, widths = cut(slimmed(make()), *REMOVALS[removal]), []
        attend = F.scaled_dot_product_attention

        def spy(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
            widths.append((q.shape[-1], k.shape[-1], v.shape[-1]))
            return attend(q, k, v, *rest, **options)

        monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
        arguments = inputs(small)
        result, _ = small(*arguments, need_weights=False)
        with sdpa_kernel(SDPBackend.MATH):
            expected, _ = small(*arguments, need_weights=False)
        qk, vo = small.qk_head_dim, small.vo_head_dim
        assert widths == [(max(qk, vo),) * 3, (qk, qk, vo)]
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("options", OPTIONS)
    def test_gradients_are_those_of_the_zeroed_original(self, options: str) -> None:
        original, removal = make(**OPTIONS[options]), ([0, 2], [0, 1, 3], [1, 2])
        small, zeroed = cut(slimmed(original), *removal), silence(original, *removal)
        arguments = inputs(original)
        for attention in (small, zeroed):
            (attention(*arguments)[0] ** 2).sum().backward()
        vo_rows = rows(removal[0], removal[2])
        expected = zeroed.out_proj.weight.grad[:, vo_rows]
        torch.testing.assert_close(small.out_proj.weight.grad, expected, rtol=0, atol=1e-11)
        assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
        weight = small.in_proj_weight if small.in_proj_weight is not None else small.v_proj_weight
        full = zeroed.in_proj_weight if zeroed.in_proj_weight is not None else zeroed.v_proj_weight
        offset = 2 * EMBED if small.in_proj_weight is not None else 0
        values = full.grad[[offset + i for i in vo_rows]]
        assert values.abs().sum() > 0
        torch.testing.assert_close(weight.grad[-len(vo_rows) :], values, rtol=0, atol=1e-11)

    def test_it_trains(self) -> None:
        small = cut(slimmed(make(dropout=0.1, batch_first=True)), [0, 2], [0, 1, 3], [1, 2])
        optimizer = torch.optim.Adam(small.parameters(), lr=0.02)
        x, target = torch.randn(8, 5, EMBED).double(), torch.randn(8, 5, EMBED).double()
        losses = []
        for _ in range(40):
            loss = nn.functional.mse_loss(small(x, x, x, need_weights=False)[0], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]


class TestConversion:
    @pytest.mark.parametrize("options", OPTIONS)
    def test_there_and_back(self, options: str) -> None:
        attention = make(**OPTIONS[options]).eval()
        before, parameters = copy.deepcopy(vars(attention)), dict(attention.named_parameters())
        out_before = copy.deepcopy(vars(attention.out_proj))
        slim_(attention)
        assert type(attention) is SlimMultiheadAttention
        assert (attention.num_heads, attention.qk_head_dim, attention.vo_head_dim) == (HEADS, WIDTH, WIDTH)
        assert all(p is parameters[name] for name, p in attention.named_parameters())
        tensors = {name: p.data for name, p in attention.named_parameters()}
        cut(attention, [0, 2], [0, 1, 3], [1])
        assert attention.out_proj.in_features == 2
        for name, p in attention.named_parameters():
            p.data = tensors[name]
        unslim_(attention)
        assert type(attention) is nn.MultiheadAttention
        assert vars(attention).keys() == before.keys()
        plain = {name: value for name, value in vars(attention).items() if isinstance(value, bool | int | float | str)}
        assert plain == {name: before[name] for name in plain}
        assert {n: v for n, v in vars(attention.out_proj).items() if n[0] != "_"} == {
            n: v for n, v in out_before.items() if n[0] != "_"
        }
        assert all(p is parameters[name] for name, p in attention.named_parameters())

    def test_converting_twice_changes_nothing(self) -> None:
        small = cut(slimmed(make()), [0, 2], [0, 1, 3], [1])
        before = dict(vars(small))
        slim_(small)
        assert vars(small) == before

    def test_the_optimizer_keeps_its_parameters(self) -> None:
        attention = make()
        optimizer = torch.optim.AdamW(attention.parameters(), lr=0.1)
        slim_(attention)
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in attention.parameters()}

    @pytest.mark.parametrize("options", ["plain", "all"])
    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
    )
    def test_copies(self, options: str, duplicate: Callable[[Any], Any]) -> None:
        small = cut(slimmed(make(**OPTIONS[options])), [0, 2], [0, 1, 3], [1])
        copied = duplicate(small)
        assert type(copied) is SlimMultiheadAttention and not copied._qkv_same_embed_dim
        assert vars(copied)["_qkv_same_embed_dim"] == vars(small)["_qkv_same_embed_dim"]
        arguments = inputs(small)
        assert_same(small(*arguments), copied(*arguments), tolerance=0)

    @pytest.mark.parametrize("options", OPTIONS)
    def test_state_dict_round_trip(self, options: str) -> None:
        original = make(**OPTIONS[options])
        removal = ([0, 2], [0, 1, 3], [1])
        small, other = cut(slimmed(original), *removal), cut(slimmed(make(**OPTIONS[options])), *removal)
        assert small.state_dict().keys() == original.state_dict().keys()
        buffer = io.BytesIO()
        torch.save(small.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        arguments = inputs(original)
        assert_same(small(*arguments), other(*arguments), tolerance=0)

    def test_casts_and_train_mode_keep_the_counts(self) -> None:
        small = cut(slimmed(make()), [0, 2], [0, 1, 3], [1]).float().double().train().eval()
        assert type(small) is SlimMultiheadAttention
        assert (small.num_heads, small.qk_head_dim, small.vo_head_dim, small.head_dim) == (2, 3, 1, WIDTH)
        arguments = inputs(small)
        assert small(*arguments)[0].shape == (TARGETS, BATCH, EMBED)

    def test_repr_shows_the_counts(self) -> None:
        small = cut(slimmed(make()), [0, 2], [0, 1, 3], [1])
        assert "num_heads=2, qk_head_dim=3, vo_head_dim=1" in repr(small)
        assert "in_features=2, out_features=12" in repr(small)

    def test_sizes_agree_with_the_original(self) -> None:
        for options in OPTIONS.values():
            attention = make(**options)
            lengths = sizes(attention, HEADS, WIDTH, WIDTH)
            assert lengths.keys() == {n for n, _ in attention.named_parameters()} - {"out_proj.bias"}
            assert all(attention.get_parameter(n).shape[axis] == size for n, (axis, size) in lengths.items())

    def test_sizes_by_hand(self) -> None:
        assert sizes(make(add_bias_kv=True), 2, 3, 5) == {
            "in_proj_weight": (0, 22),
            "in_proj_bias": (0, 22),
            "bias_k": (2, 6),
            "bias_v": (2, 10),
            "out_proj.weight": (1, 10),
        }
        separate = sizes(make(kdim=7, bias=False), 2, 3, 5)
        assert separate == {
            "q_proj_weight": (0, 6),
            "k_proj_weight": (0, 6),
            "v_proj_weight": (0, 10),
            "out_proj.weight": (1, 10),
        }


def shake(model: Any) -> Any:
    """Float64, and every parameter off its initial value: the layers of a stack start as copies."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def only_attention_dropout(model: Any) -> Any:
    """Other dropouts draw in the order in which their input lies in memory, which is not part of what is compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def attentions(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]


def slim_stack(model: Any, which: tuple[int, ...] | None = None) -> Any:
    slim = copy.deepcopy(model)
    for i, attention in enumerate(attentions(slim)):
        if which is None or i in which:
            slim_(attention)
    return slim


def left_aligned_padding() -> Tensor:
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    padding[2, 1:] = True
    return padding


# In inference the encoder turns a padded batch into a nested tensor; torch announces that those are a prototype.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
class TestTransformers:
    @staticmethod
    def encoder(heads: int = EVEN, norm_first: bool = False, **options: Any) -> nn.TransformerEncoder:
        layer = nn.TransformerEncoderLayer(EMBED, heads, 16, 0.2, batch_first=True, norm_first=norm_first, **options)
        return shake(nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first))

    @pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
    @pytest.mark.parametrize("padded", ["none", "left_aligned", "scattered"])
    @pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
    @pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"norm_first": True}], ids=str)
    def test_encoder_in_inference(
        self, options: dict[str, Any], which: tuple[int, ...], padded: str, grad: bool
    ) -> None:
        encoder = self.encoder(**options).eval()
        x, padding = torch.randn(3, 5, EMBED).double(), None
        if padded != "none":
            padding = left_aligned_padding()
            padding = padding if padded == "left_aligned" else padding.roll(1, dims=1)
        with torch.set_grad_enabled(grad):
            expected = encoder(x, src_key_padding_mask=padding)
            result = slim_stack(encoder, which)(x, src_key_padding_mask=padding)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("which", [(0,), (1,), (0, 1, 2)], ids=str)
    def test_smaller_encoder_in_inference(self, which: tuple[int, ...], padded: bool) -> None:
        """Two of four heads are left, an even number: only the class keeps the fused kernel from the packed weights."""
        encoder = self.encoder(heads=4).eval()
        small, removal = slim_stack(encoder, which), ([0, 2], [0, 2], [1])
        for i in which:
            cut(attentions(small)[i], *removal, total=4)
            silence(attentions(encoder)[i], *removal, total=4)
        x, padding = torch.randn(3, 5, EMBED).double(), left_aligned_padding() if padded else None
        with torch.no_grad():
            expected = encoder(x, src_key_padding_mask=padding)
            result = small(x, src_key_padding_mask=padding)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)

    def test_the_fused_layer_is_never_entered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder = self.encoder().eval()
        entered = []
        fused = torch._transformer_encoder_layer_fwd
        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: entered.append(1) or fused(*a))
        monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *a: pytest.fail("fused attention entered"))
        x = torch.randn(3, 5, EMBED).double()
        with torch.no_grad():
            encoder(x)
            assert len(entered) == 3  # the original does
            for padding in (None, left_aligned_padding()):
                slim_stack(encoder)(x, src_key_padding_mask=padding)
                slim_stack(encoder).layers[0](x, src_key_padding_mask=padding)
        assert len(entered) == 3

    def test_encoder_in_training(self) -> None:
        encoder, x = only_attention_dropout(self.encoder().train()), torch.randn(3, 5, EMBED).double()
        results = []
        for model in (encoder, slim_stack(encoder)):
            torch.manual_seed(3)
            results.append(model(x, src_key_padding_mask=left_aligned_padding()))
        torch.testing.assert_close(*results, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_encoder_decoder(self, batch_first: bool, norm_first: bool, training: bool) -> None:
        with (
            pytest.warns(UserWarning, match="enable_nested_tensor is True")
            if norm_first or not batch_first
            else contextlib.nullcontext()
        ):
            model = nn.Transformer(EMBED, EVEN, 2, 2, 16, 0.2, batch_first=batch_first, norm_first=norm_first)
        only_attention_dropout(shake(model).train(training))
        source, target = torch.randn(3, 5, EMBED).double(), torch.randn(3, 4, EMBED).double()
        if not batch_first:
            source, target = source.transpose(0, 1), target.transpose(0, 1)
        arguments = {
            "tgt_mask": nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64),
            "tgt_is_causal": True,
            "src_key_padding_mask": left_aligned_padding(),
            "memory_key_padding_mask": left_aligned_padding(),
        }
        results = []
        for module in (model, slim_stack(model)):
            torch.manual_seed(3)
            with torch.set_grad_enabled(training):
                results.append(module(source, target, **arguments))
        # Memory at padded places differs with the path that the encoder takes, and no target sees it.
        torch.testing.assert_close(*results, rtol=0, atol=1e-12)

    def test_encoder_built_from_a_slim_layer(self) -> None:
        layer = nn.TransformerEncoderLayer(EMBED, EVEN, 16, batch_first=True)
        slim_(layer.self_attn)
        with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
            encoder = nn.TransformerEncoder(layer, 2)
        assert all(type(attention) is SlimMultiheadAttention for attention in attentions(encoder))

    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("average", [False, True])
    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
    def test_nested_input(self, layout: torch.layout, need_weights: bool, average: bool) -> None:
        original = make(EVEN, batch_first=True).eval()
        sequences = [torch.randn(n, EMBED, dtype=torch.float64) for n in (3, 1, 4)]
        x = torch.nested.nested_tensor(sequences, layout=layout)
        with torch.no_grad():
            result, weights = slimmed(original)(x, x, x, need_weights=need_weights, average_attn_weights=average)
            assert result.is_nested and result.layout == layout
            for sequence, output in zip(sequences, result.unbind(), strict=True):
                expected, _ = original(sequence, sequence, sequence)
                torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
            if layout == torch.strided:
                _, expected = original(x, x, x, need_weights=need_weights, average_attn_weights=average)
                assert_same([expected], [weights])

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.parametrize("how", ["compile", "export"])
    def test_compiled_and_exported(self, how: str) -> None:
        encoder = slim_stack(self.encoder(heads=4).eval())
        for attention in attentions(encoder):
            cut(attention, [0, 2], [0, 2], [1], total=4)
        x = torch.randn(3, 5, EMBED).double()
        with torch.no_grad():
            expected = encoder(x)
            if how == "compile":
                result = torch.compile(encoder, backend="eager", fullgraph=True)(x)
            else:
                result = torch.export.export(encoder, (x,)).module()(x)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


class TestErrors:
    @pytest.mark.parametrize(
        ("query", "key", "value", "match"),
        [
            ((4, 2, 11), (5, 2, 12), (5, 2, 12), r"Expected 12 features in query, got \(4, 2, 11\)"),
            ((4, 2, 12), (5, 2, 11), (5, 2, 12), r"Expected 12 features in key, got \(5, 2, 11\)"),
            ((4, 2, 12), (5, 2, 12), (5, 2, 11), r"Expected 12 features in value, got \(5, 2, 11\)"),
            ((4, 2, 12), (5, 12), (5, 12), r"Expected key to be 3-D as query is, got \(5, 12\)"),
            ((4, 12), (5, 12), (5, 2, 12), r"Expected value to be 2-D as query is, got \(5, 2, 12\)"),
            ((12,), (12,), (12,), r"Expected query to be 3-D, or 2-D for unbatched inputs, got \(12,\)"),
            ((4, 2, 12), (5, 2, 12), (6, 2, 12), "Expected key and value to be equally long"),
            ((4, 2, 12), (5, 3, 12), (5, 3, 12), "Expected query and key to agree in the batch axis 1"),
        ],
    )
    def test_shapes(self, query: tuple[int], key: tuple[int], value: tuple[int], match: str) -> None:
        arguments = [torch.randn(*shape, dtype=torch.float64) for shape in (query, key, value)]
        with pytest.raises((AssertionError, RuntimeError)):
            make()(*arguments)
        with pytest.raises(ValueError, match=match):
            slimmed(make())(*arguments)

    @pytest.mark.parametrize(
        ("masked", "match"),
        [
            (
                {"attn_mask": torch.zeros(5, 4)},
                r"Expected attn_mask of shape \(4, 5\) or \(6, 4, 5\).*num_heads=3, got \(5, 4\)",
            ),
            ({"attn_mask": torch.zeros(5, 4, 5)}, r"num_heads=3, got \(5, 4, 5\)"),
            (
                {"attn_mask": torch.zeros(4, 5, dtype=torch.long)},
                "Expected attn_mask to be boolean or floating point, got",
            ),
            ({"key_padding_mask": torch.zeros(5, 2)}, r"Expected key_padding_mask of shape \(2, 5\), got \(5, 2\)"),
            ({"key_padding_mask": torch.zeros(5)}, r"Expected key_padding_mask of shape \(2, 5\), got \(5,\)"),
            ({"key_padding_mask": torch.zeros(2, 5).int()}, "Expected key_padding_mask to be boolean or floating"),
            ({"is_causal": True}, "Expected attn_mask together with is_causal=True"),
        ],
    )
    def test_masks(self, masked: dict[str, Any], match: str) -> None:
        original = make()
        arguments = inputs(original)
        with pytest.raises((AssertionError, RuntimeError)):
            original(*arguments, **masked)
        with pytest.raises(ValueError, match=match):
            slimmed(original)(*arguments, **masked)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("case", ["cross", "masked", "batch_second"])
    def test_nested(self, case: str) -> None:
        slim = slimmed(make(batch_first=case != "batch_second"))
        x = torch.nested.nested_tensor([torch.randn(n, EMBED, dtype=torch.float64) for n in (3, 1)])
        key = x.clone() if case == "cross" else x
        padding = torch.zeros(2, 3, dtype=torch.bool) if case == "masked" else None
        with pytest.raises(ValueError, match="Expected nested tensors only in self-attention"):
            slim(x, key, key, key_padding_mask=padding, need_weights=False)

    def test_only_the_original_is_converted(self) -> None:
        class Custom(nn.MultiheadAttention):
            pass

        for module, name in ((Custom(EMBED, HEADS), "Custom"), (nn.Linear(2, 2), "Linear")):
            with pytest.raises(
                TypeError, match=rf"Expected nn.MultiheadAttention itself, not a subclass, got .*{name}"
            ):
                slim_(module)  # type: ignore[arg-type]

    def test_only_the_slim_one_is_resized_or_converted_back(self) -> None:
        for function in (resize, unslim_):
            with pytest.raises(TypeError, match=r"Expected SlimMultiheadAttention itself.*MultiheadAttention"):
                function(make())

    def test_not_constructed(self) -> None:
        with pytest.raises(TypeError, match=r"convert it with slim_\(attention\)"):
            SlimMultiheadAttention(EMBED, HEADS)

    def test_sliced_before_conversion(self) -> None:
        attention = make()
        attention.out_proj.weight.data = attention.out_proj.weight.data[:, :8]
        with pytest.raises(ValueError, match=r"Expected out_proj\.weight of length 12 on axis 1 for heads=3"):
            slim_(attention)
        assert type(attention) is nn.MultiheadAttention and not hasattr(attention, "scale")

    @pytest.mark.parametrize(
        ("counts", "match"),
        [
            (
                {"heads": 2},
                r"Expected in_proj_weight of length 24 on axis 0 for heads=2, qk_head_dim=4, vo_head_dim=4, got",
            ),
            ({"vo_head_dim": 3}, r"of length 33 on axis 0 .*got shape \(36, 12\)"),
            ({"heads": 0}, "Expected heads >= 1, got 0"),
            ({"qk_head_dim": 0}, "Expected qk_head_dim >= 1, got 0"),
            ({"vo_head_dim": -1}, "Expected vo_head_dim >= 1, got -1"),
            # 3 * (2 * 5 + 2) rows are 3 * (2 * 4 + 4) rows: only the output projection tells
            (
                {"qk_head_dim": 5, "vo_head_dim": 2},
                r"Expected out_proj.weight of length 6 on axis 1 .*got shape \(12, 12\)",
            ),
        ],
    )
    def test_counts_that_disagree_with_the_parameters(self, counts: dict[str, int], match: str) -> None:
        slim = slimmed(make())
        with pytest.raises(ValueError, match=match):
            resize(slim, **counts)
        assert (slim.num_heads, slim.qk_head_dim, slim.vo_head_dim) == (HEADS, WIDTH, WIDTH)
        assert slim.out_proj.in_features == EMBED

    def test_converted_back_before_the_tensors(self) -> None:
        small = cut(slimmed(make()), [0, 2], [0, 1, 3], [1])
        with pytest.raises(ValueError, match="Expected in_proj_weight of length 36 on axis 0"):
            unslim_(small)
        assert type(small) is SlimMultiheadAttention and small.num_heads == 2
