"""The report as a page: whole in one file, all numbers in it, nothing in a name can get out of its place."""

from __future__ import annotations

import base64
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightning_compress import CompressionReport, write_html
from lightning_compress.report import FitHistory, Latency, Round, StructureCount
from lightning_compress.report.environment import environment
from lightning_compress.report.maps import ModelMaps
from tests.report.test_map_pictures import maps
from tests.report.test_report import report
from tests.report.test_tokens import summary

pytest.importorskip("matplotlib", reason="needs the extra `report`")
pytest.importorskip("jinja2", reason="needs the extra `report`")

HOSTILE = """layers.0.<script>alert("x")</script>'&"""


def whole() -> CompressionReport:
    """A report with something in every field."""
    times = [Latency(seconds, 0.9 * seconds, 40 + n, 0.01 * (n + 1)) for n, seconds in enumerate((0.31, 0.17))]
    return report(
        rounds=(Round(400, 1_234_567, 0.61, 2.25, before=times[0], after=times[1]), Round(600, 500_000, 0.25, 1.75)),
        structures=(
            StructureCount(HOSTILE, "head", 12, 3, "native"),
            StructureCount("layer.0.ffn", "ffn", 77, 31, "shim"),
        ),
        tokens=replace(summary(), dense_macs=17.5),
    )


def history() -> FitHistory:
    found = FitHistory()
    found.add(maps(), "begin of the fit")
    found.add(replace(maps(), step=40))
    found.add(replace(maps(), step=50), "before removal")
    found.add(ModelMaps(50, tuple(replace(m, sparsity=0.9) for m in maps().matrices[:2])), "after removal")
    found.removals.append(50)
    for step, value in ((10, 0.5), (50, 0.75), (90, 0.7), (90, 0.72), (95, float("nan"))):
        found.add_metric("val_accuracy", step, value)
    return found


class Page(HTMLParser):
    """What there is in a page: elements with their attributes, text by element, and which were left open."""

    VOID = ("meta", "img", "br", "link", "hr")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def numbers(data: Any) -> Iterator[float]:
    """Every number in plain data, that of a bool left out."""
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list | tuple):
        for part in data:
            yield from numbers(part)
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield float(data)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert write_html(whole(), str(path), history(), environment={"device": "cpu", "threads": "1"}) == path
    return path.read_text(encoding="utf-8")


def test_it_is_one_file_that_fetches_nothing(text: str) -> None:
    page = Page(text)
    assert page.open == []
    assert not [tag for tag, _ in page.elements if tag in ("script", "link", "iframe", "object", "embed", "base", "a")]
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "style", "action", "data", "poster", "background"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:image/png;base64,")
        assert not [name for name in attributes if name.startswith("on")]
    images = page.all("img")
    assert len(images) >= 10
    for image in images:
        assert base64.b64decode((image["src"] or "").partition(",")[2], validate=True).startswith(b"\x89PNG")
        assert image["alt"]
    (style,) = (content for tag, content in page.texts if tag == "style")
    assert "url(" not in style and "@import" not in style
    outside = re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
    assert "://" not in outside


def test_it_is_made_for_phones_and_for_paper(text: str) -> None:
    page = Page(text)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert text.lstrip().startswith("<!DOCTYPE html>") and page.all("html") == [{"lang": "en"}]
    (style,) = (content for tag, content in page.texts if tag == "style")
    assert "@media print" in style and "@media (max-width" in style and re.search(r"img \{[^}]*max-width: 100%", style)
    assert text.count("<table>") == text.count('<div class="scroll"><table>') == len(page.all("table"))


def test_every_number_of_the_report_is_there_in_full(text: str) -> None:
    found = {float(data["value"] or "") for data in Page(text).all("data")}
    missing = [number for number in numbers(whole().to_dict()) if number not in found]
    assert missing == []
    assert len(found) > 40


def test_texts_names_and_sections(text: str) -> None:
    page = Page(text)
    texts = [content for _, content in page.texts]
    assert "Compression of 'model' after 600 optimizer steps: 25.0% of the prunable MACs are left" in texts
    assert HOSTILE in texts and "&lt;script&gt;" in text
    assert "2,000,000" in texts and "4.00x" in texts and "2.0e-09" in texts
    sections = [section["id"] for section in page.all("section")]
    assert sections == [
        "numbers", "verification", "structures", "rounds", "tokens", "progress", "maps", "matrices", "environment"
    ]  # fmt: skip
    headings = [content for tag, content in page.texts if tag == "h3"]
    assert headings == ["begin of the fit, step 12", "before removal, step 50", "after removal, step 50"]
    assert {"device", "cpu", "threads"} <= set(texts)


def test_a_report_alone_and_a_history_alone(tmp_path: Path) -> None:
    page = Page(write_html(report(latency={}, pinned=0), tmp_path / "a.html").read_text(encoding="utf-8"))
    assert [s["id"] for s in page.all("section")] == ["numbers", "verification", "structures", "environment"]
    page = Page(write_html(None, tmp_path / "b.html", history(), title="<b>").read_text(encoding="utf-8"))
    assert [s["id"] for s in page.all("section")] == ["tokens", "progress", "maps", "matrices", "environment"][1:]
    assert ("h1", "<b>") in page.texts
    assert any(
        content.startswith("No units were removed. The model was looked at 4 times") for _, content in page.texts
    )


def test_a_history_as_data_and_back() -> None:
    found = history()
    assert found.sparsity["out.weight"][-1] == found.sparsity["out.weight"][-2]  # it is not looked at any more
    assert found.metrics["val_accuracy"][2] == (90, 0.72)
    again = FitHistory.from_dict(found.to_dict())
    assert str(again.to_dict()) == str(found.to_dict())  # as text, because nan equals nothing


def test_the_environment_tells_versions_and_no_places() -> None:
    found = environment()
    assert {"Python", "system", "torch", "device", "threads"} <= set(found)
    import platform

    assert not any(platform.node() and platform.node() in value for value in found.values())
    assert not any("/" in value for value in found.values())


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for nothing in (None, FitHistory()):
        with pytest.raises(ValueError, match="Expected a CompressionReport or a history to write a report of"):
            write_html(None, tmp_path / "a.html", nothing)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        ImportError, match=r"Expected jinja2 to be installed.*pip install 'lightning-compress\[report\]'"
    ):
        write_html(report(), tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs a chromium browser")
@pytest.mark.parametrize("width", [1200, 400], ids=["desk", "phone"])
def test_a_browser_shows_it(width: int, text: str, tmp_path: Path) -> None:
    from matplotlib.image import imread

    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    shot = tmp_path / "shot.png"
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--force-device-scale-factor=1", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1600",
        f"--screenshot={shot}", (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert struct.unpack(">II", shot.read_bytes()[16:24])[0] >= min(width, 500)  # some browsers are not narrower
    pixels = imread(shot)[..., :3]
    assert pixels.shape[0] == 1600
    white = (pixels > 0.98).all(axis=2)
    assert 0.02 < 1 - white.mean() < 0.7  # text, lines and pictures on white
    # in every quarter of the page there is something, and the line over a section has its colour
    assert all((~part).any() for part in (white[:400], white[400:800], white[800:1200], white[1200:]))
    blue = abs(pixels - (0x08 / 255, 0x51 / 255, 0x9C / 255)).max(axis=2) < 0.02
    assert blue.any(axis=1).sum() >= 2
