"""Maps against values counted by hand: blocks, units, bits; what was removed keeps its place."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import (
    Binary,
    ModelMaps,
    PruningPlan,
    Uniform,
    apply_plan,
    attach_quantizers,
    convert,
    discover,
    matrix_map,
    model_maps,
    unit_norms,
    zero_units,
)
from lightning_compress.report.maps import families, family
from lightning_compress.report.matrix_maps import ALIVE, DEAD, GONE, PARTLY, removed_map
from tests.callbacks.modules import MLP, Transformer
from tests.report.test_tokens import summary


def weight() -> Tensor:
    """Blocks of 2 x 3: alive, dead; one row dead, one column dead; the last of 1 x 3 each: alive, one element zero."""
    w = torch.ones(5, 6)
    w[:2, 3:] = 0
    w[2, :3] = 0
    w[2:4, 4] = 0
    w[4, 5] = 0
    return w


def test_blocks_counted_by_hand() -> None:
    m = matrix_map(weight(), "up.weight", block_shape=(2, 3))
    assert m.borders == ((0, 2, 4, 5), (0, 3, 6))
    assert m.states.tolist() == [[ALIVE, DEAD], [PARTLY, PARTLY], [ALIVE, PARTLY]]
    # one of two rows; two of three columns; in a block of one row a zero is a dead column
    assert m.alive.tolist() == [[1, 0], [0.5, pytest.approx(2 / 3)], [1, pytest.approx(2 / 3)]]
    assert m.gone.count_nonzero() == 0
    assert m.sparsity == pytest.approx(12 / 30)
    assert (m.removed, m.bits, m.shape) == (0, 32, (5, 6))
    assert m.counts == {"gone": 0, "dead": 1, "partly dead": 3, "alive": 2}


def test_removed_lines_keep_their_place() -> None:
    """Rows 0 and 1 of four and column 2 of three have gone: what is left is one row of blocks and a bit."""
    rows, columns = torch.tensor([2, 3]), torch.tensor([0, 1])
    m = matrix_map(torch.ones(2, 2), shape=(4, 3), kept=(rows, columns), block_shape=(2, 2))
    assert m.states.tolist() == [[GONE, GONE], [ALIVE, GONE]]
    m = matrix_map(torch.ones(2, 2), shape=(4, 3), kept=(torch.tensor([0, 3]), columns), block_shape=(2, 3))
    assert m.states.tolist() == [[PARTLY], [PARTLY]]
    assert m.alive.tolist() == [[pytest.approx(0.5 * 2 / 3)]] * 2
    assert m.gone.tolist() == [[pytest.approx(2 / 3)]] * 2
    assert (m.removed, m.sparsity) == (pytest.approx(8 / 12), pytest.approx(8 / 12))
    # half gone, and the other half zero
    m = matrix_map(torch.zeros(2, 2), shape=(4, 2), kept=(torch.tensor([0, 2]), None), block_shape=(2, 2))
    assert m.states.tolist() == [[DEAD], [DEAD]]
    assert (m.removed, m.sparsity) == (0.5, 1.0)
    nothing = removed_map("layers.3.up.weight", (4, 3), block_grid=(2, 2))
    assert nothing.states.tolist() == [[GONE, GONE], [GONE, GONE]]
    assert (nothing.removed, nothing.sparsity, nothing.bits) == (1, 1, 0)


def test_a_threshold_is_a_root_mean_square() -> None:
    w = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.3, 0.0, 0.0, 0.0]])
    m = matrix_map(w, block_shape=(1, 4), threshold=0.12)  # 0.1 in the first line, 0.15 in the second
    assert m.states.tolist() == [[DEAD], [PARTLY]]
    assert m.alive[1].item() == pytest.approx(1 / 4)
    assert m.sparsity == pytest.approx(7 / 8)
    kernels = torch.full((2, 3, 2, 2), 0.1)
    assert matrix_map(kernels, threshold=0.12).sparsity == 1
    assert matrix_map(kernels, threshold=0.09).counts["alive"] == 6


def test_kernels_half_precision_and_what_is_no_number() -> None:
    kernels = torch.ones(4, 3, 2, 2, dtype=torch.bfloat16)
    kernels[1, 2] = 0
    m = matrix_map(kernels)
    assert m.shape == (4, 3) and m.bits == 16
    assert m.sparsity == pytest.approx(1 / 12)
    assert [tuple(p.tolist()) for p in torch.nonzero(m.states == DEAD)] == [(1, 2)]
    diverged = torch.ones(2, 2)
    diverged[0, 0] = math.nan
    assert matrix_map(diverged).counts["alive"] == 4


def test_by_default_a_side_has_32_blocks_at_most() -> None:
    assert matrix_map(torch.ones(70, 5)).alive.shape == (32, 5)
    assert matrix_map(torch.ones(70, 5), block_grid=(8, 8)).alive.shape == (8, 5)


@pytest.mark.parametrize(
    ("weight", "options", "error", "message"),
    [
        (torch.ones(3), {}, ValueError, "Expected a matrix or the kernels of a convolution, but 'w' has shape"),
        (torch.ones(3, 3), {"threshold": -1.0}, ValueError, "Expected threshold, .* at least 0, but got -1.0"),
        (torch.ones(3, 3), {"shape": (4, 3)}, ValueError, "axis 0 of 'w' that stayed of 4 .* with 3, but got 4"),
        (
            torch.ones(2, 2),
            {"shape": (2, 2), "kept": (torch.tensor([1, 2]), None)},
            ValueError,
            "Pass the plan of everything that was removed",
        ),
        (torch.ones(2, 2), {"block_shape": (1, 1), "block_grid": (1, 1)}, ValueError, "but got both"),
        (torch.ones(2, 2), {"block_grid": (1, 2, 3)}, TypeError, "Expected block_grid to be two integers"),
        (torch.ones(2, 2), {"block_grid": (1.5, 2)}, TypeError, "Expected block_grid to be two integers"),
        (torch.ones(2, 2, dtype=torch.long), {}, TypeError, "weight"),
    ],
    ids=str,
)
def test_bad_matrices(weight: Tensor, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        matrix_map(weight, "w", **options)


def pruned() -> tuple[nn.Module, Any, PruningPlan]:
    """A transformer without heads 1, 2 of the first block and without FFN units 0-89 of the second."""
    model, x = Transformer().eval(), torch.randn(2, 4, 5)
    structures = discover(model, (x,), kinds=("head", "ffn"))
    kept = {"blocks.0.head": (0, 3), "blocks.1.ffn": tuple(range(90, 96))}
    plan = PruningPlan.of(model, structures, kept)
    return model, structures, apply_plan(model, plan, verify=((x,), {})).plan


def test_a_model_before_and_after_a_removal() -> None:
    model = Transformer()
    before = model_maps(model)
    assert [m.name for m in before.matrices] == [n for n, p in model.named_parameters() if p.dim() == 2]
    assert (before.sparsity, before.removed, before.structures, before.tokens) == (0, 0, (), None)
    model, structures, plan = pruned()
    after = model_maps(model, structures, plan, block_grid=(4, 4), step=7)
    assert [(m.name, m.shape) for m in after.matrices] == [(m.name, m.shape) for m in before.matrices]
    found = {m.name: m for m in after.matrices}
    assert found["blocks.0.q.weight"].states.tolist() == [[ALIVE] * 4, [GONE] * 4, [GONE] * 4, [ALIVE] * 4]
    assert found["blocks.0.o.weight"].states.tolist() == [[ALIVE, GONE, GONE, ALIVE]] * 4
    assert found["blocks.1.up.weight"].removed == pytest.approx(90 / 96)
    assert found["blocks.1.q.weight"].removed == 0
    gone = 4 * 16 * 8 + 2 * 16 * 90
    total = sum(p.numel() for n, p in Transformer().named_parameters() if p.dim() == 2)
    assert after.removed == after.sparsity == pytest.approx(gone / total)
    assert total * (1 - after.removed) == pytest.approx(sum(p.numel() for p in model.parameters() if p.dim() == 2))


def test_units_keep_their_numbers() -> None:
    model, structures, plan = pruned()
    current = plan.shrunk(structures)
    zero_units(model, PruningPlan.of(model, current, {"blocks.0.head": [0]}))
    units = {u.name: u for u in model_maps(model, structures, plan).structures}
    norms = unit_norms(model, current)
    heads = units["blocks.0.head"]
    assert (heads.units, heads.removed, heads.alive) == (4, 2, 2)  # silenced by its output; its other weights are there
    assert heads.norms[[0, 3]].tolist() == pytest.approx(norms["blocks.0.head"].tolist())
    assert heads.norms.isnan().tolist() == [False, True, True, False]
    ffn = units["blocks.1.ffn"]
    assert ffn.norms[90:].tolist() == pytest.approx(norms["blocks.1.ffn"].tolist())
    with torch.no_grad():
        for piece in current["blocks.1.ffn"].slices:
            model.get_parameter(piece.parameter).index_fill_(piece.axis, piece.positions([2]), 0.0)
    ffn = {u.name: u for u in model_maps(model, structures, plan).structures}["blocks.1.ffn"]
    assert (ffn.units, ffn.removed, ffn.dead, ffn.alive) == (96, 90, 1, 5)
    counts, borders = ffn.histogram(bins=4)
    assert sum(counts) == 5 and counts[-1] >= 1 and borders[-1] == pytest.approx(ffn.norms[90:].max().item())
    with torch.no_grad():
        model.get_parameter("blocks.1.up.weight").fill_(math.nan)
    assert {u.name: u for u in model_maps(model, structures, plan).structures}["blocks.1.ffn"].removed == 90


def test_a_removed_layer_stays_visible() -> None:
    model, x = Transformer(), torch.randn(2, 4, 5)
    structures = discover(model, (x,), kinds=("layer", "ffn"), prove=True)
    (layer,) = [s for s in structures if s.kind == "layer" and s.members == ("blocks.1",)]
    plan = apply_plan(model, PruningPlan.of(model, structures, {layer.name: ()}), verify=((x,), {})).plan
    order = [m.name for m in model_maps(Transformer()).matrices]
    maps = model_maps(model, structures, plan, order=order)
    assert [m.name for m in maps.matrices] == order
    assert {m.name for m in maps.matrices if m.removed == 1} == {n for n in order if n.startswith("blocks.1.")}
    (units,) = [u for u in maps.structures if u.name == "blocks.1.ffn"]
    assert (units.units, units.removed) == (96, 96)


def test_bits_of_quantized_and_of_packed_weights() -> None:
    model = MLP()
    attach_quantizers(model, {"layers.0.weight": Uniform(4), "layers.2.weight": Binary()})
    maps = model_maps(model)
    assert [m.bits for m in maps.matrices] == [4, 1, 32]
    sizes = (12 * 5, 10 * 12, 3 * 10)
    assert maps.mean_bits == pytest.approx((4 * sizes[0] + sizes[1] + 32 * sizes[2]) / sum(sizes))
    structures = discover(model, (torch.randn(2, 5),))
    convert(model, "packed")
    packed = model_maps(model, structures)
    assert {m.name: m.bits for m in packed.matrices} == {m.name: m.bits for m in maps.matrices}
    assert [u.alive for u in packed.structures] == [12, 10]


def test_choosing_parameters() -> None:
    maps = model_maps(Transformer(), parameters=("blocks.*.up.weight", "embed*"))
    assert [m.name for m in maps.matrices] == ["embed.weight", "blocks.0.up.weight", "blocks.1.up.weight"]
    with pytest.raises(ValueError, match=r"Expected parameters to match matrices of Transformer, but 'block' matches"):
        model_maps(Transformer(), parameters=("block",))
    with pytest.raises(ValueError, match="Expected a model with matrices to draw maps of, but LayerNorm has no"):
        model_maps(nn.LayerNorm(3))


def test_as_json_and_back() -> None:
    model, structures, plan = pruned()
    with torch.no_grad():
        model.get_parameter("blocks.0.up.weight")[0, 0] = math.inf
    maps = replace(model_maps(model, structures, plan, step=3), tokens=summary())
    data = json.loads(json.dumps(maps.to_dict(), allow_nan=False))
    again = ModelMaps.from_dict(data)
    assert json.loads(json.dumps(again.to_dict())) == data
    assert torch.equal(again.matrices[1].states, maps.matrices[1].states)
    assert again.structures[0].norms.isnan().equal(maps.structures[0].norms.isnan())
    metrics = maps.metrics()
    assert metrics["sparsity_maps/alive/head"] == 6 / 8
    assert metrics["sparsity_maps/alive/ffn"] == (96 + 6) / 192
    assert metrics["sparsity_maps/tokens_macs_kept"] == summary().macs_kept


def test_names_as_places_in_stacks() -> None:
    assert family("0.weight") == ("*.weight", 0)
    assert family("a.layers.11.b2.weight") == ("a.layers.*.b2.weight", 11)
    assert families({"l.0.w": 1.0, "l.1.w": 0.5, "out": 0.0}) == {"l.*.w": {0: 1.0, 1: 0.5}, "out": {0: 0.0}}
