"""What is drawn is what was measured, without anything global; and what to install for it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_compress.report import TokenSummary, save_token_picture, token_picture
from tests.report.test_tokens import summary

MANY = TokenSummary(
    policy="top_k",
    values=(1.0, 0.6, 0.3),
    examples=10,
    tokens=50.0,
    macs=(4e9, 2e9),
    dense_macs=None,
    kept_per_layer=(1.0, 1.0, 0.6, 0.3),
    quantiles=(0.3, 0.45, 0.9),
    histogram=(0, 3, 5, 0, 2),
)


@pytest.mark.parametrize("found", [MANY, summary()], ids=["many", "few"])
def test_curve_and_bars_are_the_numbers(found: TokenSummary) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    curve, bars = token_picture(found).axes
    (line,) = curve.lines
    layers = len(found.kept_per_layer)
    assert list(line.get_xdata()) == list(range(1, layers + 1))
    assert list(line.get_ydata()) == pytest.approx([100 * kept for kept in found.kept_per_layer])
    assert [bar.get_height() for bar in bars.patches] == list(found.histogram)
    width = 100 / len(found.histogram)
    assert [bar.get_x() for bar in bars.patches] == pytest.approx([width * n for n in range(len(found.histogram))])
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([width] * len(found.histogram))
    (median,) = bars.lines
    assert list(median.get_xdata()) == pytest.approx([100 * found.quantiles[1]] * 2)
    assert bars.get_xlim() == (0, 100)


def test_axes_say_what_they_show() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    curve, bars = token_picture(MANY).axes
    assert curve.get_title() == "Tokens that enter each layer, by top_k"
    assert (curve.get_xlabel(), curve.get_ylabel()) == ("layer", "% of the tokens of all examples")
    assert bars.get_title() == "MACs that are left of each of 10 examples"
    assert (bars.get_xlabel(), bars.get_ylabel()) == ("% of the MACs of the layers with all tokens", "examples")
    assert [text.get_text() for text in bars.get_legend().get_texts()] == ["median, 45.0 %"]


@pytest.mark.parametrize(("name", "begin"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")])
def test_a_file_is_written_and_nothing_else_changes(name: str, begin: bytes, tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs the extra `report`")
    settings, figures = dict(pyplot.rcParams), pyplot.get_fignums()
    save_token_picture(MANY, tmp_path / name)
    save_token_picture(replace(MANY, kept_per_layer=(1.0,)), str(tmp_path / name))  # one layer, over the old file
    assert (tmp_path / name).read_bytes().startswith(begin)
    assert pyplot.get_fignums() == figures
    assert dict(pyplot.rcParams) == settings


def test_an_unknown_suffix(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    with pytest.raises(ValueError, match="Format 'tokens' is not supported"):
        save_token_picture(MANY, tmp_path / "a.tokens")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=r"Expected matplotlib to be installed.*pip install 'lightning-compress\[report\]'"
    ):
        save_token_picture(MANY, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
