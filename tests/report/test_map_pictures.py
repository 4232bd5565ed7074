"""What is drawn is what is in the arrays: colours of blocks and units, heights of bars, points of curves."""

import io
import sys
from typing import Any

import pytest
import torch

from lightning_compress import draw_maps
from lightning_compress.report.maps import ModelMaps
from lightning_compress.report.matrix_maps import ALIVE, DEAD, GONE, matrix_map
from lightning_compress.report.unit_maps import UnitMap
from tests.report.test_maps import weight
from tests.report.test_tokens import summary

pytest.importorskip("matplotlib", reason="needs the extra `report`")

from matplotlib.colors import to_rgb
from matplotlib.image import imread

from lightning_compress.report import map_pictures as drawing


def maps() -> ModelMaps:
    nan = float("nan")
    return ModelMaps(
        step=12,
        matrices=(
            matrix_map(weight(), "layers.0.up.weight", block_shape=(2, 3)),
            matrix_map(
                torch.ones(2, 6), "layers.1.up.weight", shape=(5, 6), kept=(torch.tensor([0, 1]), None), bits=4,
                block_shape=(2, 3),
            ),
            matrix_map(torch.ones(3, 5), "out.weight"),
        ),
        structures=(
            UnitMap("layers.0.head", "head", torch.tensor([1.0, 0.0, nan, 2.0], dtype=torch.float64)),
            UnitMap("layers.1.head", "head", torch.tensor([2.0, 1.5], dtype=torch.float64)),
            UnitMap("layers.0.ffn", "ffn", torch.tensor([4.0, 0.1, 0.0, nan, nan], dtype=torch.float64)),
        ),
        tokens=summary(),
    )  # fmt: skip


def test_blocks_have_the_colours_of_their_states() -> None:
    (axes,) = drawing.block_picture(maps()).axes
    first, second, last = (image.get_array() for image in axes.images)
    colour = {state: pytest.approx(to_rgb(drawing.COLOURS[state])) for state in (GONE, DEAD, ALIVE)}
    assert tuple(first[0][0]) == colour[ALIVE] and tuple(first[0][1]) == colour[DEAD]
    half, two_thirds = first[1][0], first[1][1]
    assert sum(half) > sum(two_thirds) > sum(first[0][0])  # the paler, the less is alive
    assert half[2] > half[1] > half[0]  # and blue
    assert tuple(second[1][0]) == tuple(second[2][1]) == colour[GONE]
    assert last.shape == (3, 5, 3)
    texts = {text.get_text() for text in axes.texts}
    assert {"layers.*", "up.weight", "40%", "60%", "other matrices", "out 0%"} <= texts
    assert any(text.startswith("Blocks of the matrices at step 12: ") for text in texts)


def test_units_of_all_states() -> None:
    axes = drawing.unit_picture(maps()).axes[0]
    (image,) = axes.images
    rows = image.get_array()
    assert rows.shape == (2, 4, 3)
    assert tuple(rows[0][1]) == pytest.approx(to_rgb(drawing.COLOURS[DEAD]))
    assert tuple(rows[0][2]) == pytest.approx(to_rgb(drawing.COLOURS[GONE]))
    assert tuple(rows[0][3]) == tuple(rows[1][0]) != tuple(rows[0][0])
    assert tuple(rows[1][2]) == (1, 1, 1)  # the second layer has two
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layers.0.head", "layers.1.head"]
    assert "4 of 6 alive" in axes.get_title(loc="left")
    assert drawing.unit_picture(maps(), "channel") is None


def test_histograms_with_the_dead_and_the_gone_behind_them() -> None:
    (axes,) = drawing.norm_picture(maps()).axes
    bars = [bar for bar in axes.patches if bar.get_height() > 0]
    places = sorted((round(bar.get_x(), 6), round(bar.get_height(), 6)) for bar in bars)
    one = round(1.9 / 5, 6)  # one of five units in a bin
    assert places[:2] == [(0.0, one), (3.8, one)]
    assert places[2:] == [(round(4 * 1.03, 6), round(0.95 / 5, 6)), (round(4 * 1.08, 6), round(0.95 * 2 / 5, 6))]
    assert axes.get_yticklabels()[0].get_text() == "layers.0.ffn\n2 of 5"
    assert drawing.norm_picture(ModelMaps(0, maps().matrices)) is None


def test_curves_over_layers_and_training() -> None:
    (axes,) = drawing.layer_picture(maps()).axes
    stack, out = axes.lines
    assert (stack.get_label(), list(stack.get_xdata())) == ("layers.*.up.weight", [0, 1])
    assert list(stack.get_ydata()) == pytest.approx([40, 60])
    assert (out.get_label(), list(out.get_ydata())) == ("out.weight", [0])
    sparsity = {"layers.0.up.weight": [0.0, 0.5, 0.5], "layers.1.up.weight": [0.0, 0.1, 0.3], "out.weight": [0, 0, 0]}
    curves, grid = drawing.history_picture([0, 10, 10], sparsity, [10]).axes
    assert list(curves.lines[0].get_xdata()) == [0, 10, 10]
    assert list(curves.lines[0].get_ydata()) == pytest.approx([0, 30, 40])
    assert list(curves.lines[2].get_xdata()) == [10, 10]  # the removal
    (mesh,) = grid.collections
    assert mesh.get_array().reshape(3, 3).tolist() == [*sparsity.values()]
    assert [label.get_text() for label in grid.get_xticklabels()] == ["0", "10", "10"]


def test_metrics_and_bits() -> None:
    assert drawing.metrics_picture({}) is None and drawing.metrics_picture({"a": []}) is None
    first, second, third, empty = drawing.metrics_picture(
        {"a": [(1, 0.5), (2, 0.25)], "b": [(1, 3.0)], "c": [(2, 1)]}, [1]
    ).axes
    assert list(first.lines[0].get_ydata()) == [0.5, 0.25] and list(first.lines[1].get_xdata()) == [1, 1]
    assert [axes.get_title() for axes in (first, second, third)] == ["a", "b", "c"]
    assert not empty.lines
    (bits,) = drawing.bits_picture(maps()).axes
    assert [bar.get_width() for bar in bits.patches] == [32, 4, 32]


def test_all_kinds_as_pixels_and_files() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    settings, figures = dict(pyplot.rcParams), pyplot.get_fignums()
    drawn = draw_maps(maps())
    assert list(drawn) == ["blocks", "heads", "norms", "layers", "bits", "tokens"]
    assert list(draw_maps(ModelMaps(0, maps().matrices))) == ["blocks", "layers", "bits"]
    array = drawing.pixels(drawn["heads"])
    width, height = (int(side) for side in drawn["heads"].get_size_inches() * drawing.DPI)
    assert array.shape == (height, width, 3) and array.dtype == "uint8"
    assert 0.02 < (array < 250).any(axis=2).mean() < 0.98
    read = imread(io.BytesIO(drawing.png(array)))
    assert (read[..., :3] * 255).round().astype("uint8").tolist() == array.tolist()
    assert pyplot.get_fignums() == figures and dict(pyplot.rcParams) == settings


def test_many_and_strange_names_are_drawn() -> None:
    many = tuple(matrix_map(torch.ones(2, 2), f"layers.{n // 3}.{'abc'[n % 3]}.<b>$x_{{$") for n in range(90))
    shape = drawing.pixels(drawing.block_picture(ModelMaps(0, many))).shape
    assert shape[1] == 1000 and shape[0] < 1000
    assert drawing.pixels(drawing.layer_picture(ModelMaps(0, many))).shape == (450, 1000, 3)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.colors"):
        monkeypatch.setitem(sys.modules, name, None)
    calls: list[Any] = [drawing.block_picture, drawing.layer_picture, drawing.bits_picture, drawing.norm_picture]
    for draw in calls:
        with pytest.raises(ImportError, match=r"pip install 'lightning-compress\[report\]'"):
            draw(maps())
