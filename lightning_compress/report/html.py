"""One HTML file with everything that a run has shown: numbers, tables, pictures; nothing is fetched from elsewhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from lightning_compress.report.compression import CompressionReport
from lightning_compress.report.environment import environment as this_environment
from lightning_compress.report.history import FitHistory
from lightning_compress.report.map_pictures import (
    bits_picture,
    block_picture,
    check_matplotlib,
    history_picture,
    layer_picture,
    metrics_picture,
    norm_picture,
    pixels,
    png,
    unit_picture,
)
from lightning_compress.report.maps import ModelMaps
from lightning_compress.report.pictures import token_picture
from lightning_compress.report.text import byte_size, ratio, si
from lightning_compress.report.tokens import TokenSummary
from lightning_compress.timing import Latency

TEMPLATE = "report.html.jinja"


class Cell(NamedTuple):
    """A number as it is shown, and as it is."""

    text: str
    value: float | int | None = None


class Picture(NamedTuple):
    """A picture as the source of an image, and what it shows in words."""

    source: str
    title: str


def write_html(
    report: CompressionReport | None,
    path: str | Path,
    history: FitHistory | None = None,
    *,
    title: str = "Compression report",
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Write a report as one HTML file that needs nothing else: no network, no scripts, pictures inside.

    It has the numbers before and after, kept units of every structure, the verification error, latency, times of
    training steps, tokens, the maps at the moments that ``history`` shows whole, sparsity and metrics over training,
    and the environment. It reads on a phone and prints. Every number is there in full in a ``data`` element.

    Args:
        report: the numbers, as `FinalizeCompression` has them in ``report``; None where nothing was removed.
        path: of the file, in a folder that is there.
        history: what the fit has shown, as `SparsityMaps` has it in ``history``; None for the numbers alone.
        title: of the page.
        environment: what to say of the machine, by name. Default: versions and device of this process.

    Returns:
        The path.

    Raises:
        ImportError: without jinja2 or matplotlib, with the extra that brings them.
        ValueError: without a report and without a history.
    """
    if report is None and (history is None or not history.steps):
        raise ValueError(
            "Expected a CompressionReport or a history to write a report of, but got neither. Pass finalize.report, or "
            "the history of SparsityMaps, after the fit."
        )
    check_html()
    from jinja2 import Environment, StrictUndefined

    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("lightning_compress.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    text = engine.from_string(source).render(
        title=title,
        headline=_headline(report, history),
        numbers=[] if report is None else _numbers(report),
        report=report,
        error=None if report is None else Cell(f"{report.error:.1e}", report.error),
        structures=[] if report is None else _structures(report),
        rounds=[] if report is None else _rounds(report),
        tokens=_tokens(None if report is None else report.tokens, history),
        progress=[] if history is None else _progress(history),
        moments=[] if history is None else _moments(history),
        matrices=[] if history is None or not history.moments else _matrices(history.moments[-1][1]),
        environment=this_environment() if environment is None else environment,
    )
    target = Path(path)
    target.write_text(text, encoding="utf-8")
    return target


def check_html() -> None:
    """Raise ImportError, naming the extra, unless everything that a HTML report needs can be imported."""
    check_matplotlib()
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Expected jinja2 to be installed for a HTML report, but it cannot be imported ({error}). "
            "Install the extra: pip install 'lightning-compress[report]'."
        ) from error


def _headline(report: CompressionReport | None, history: FitHistory | None) -> str:
    if report is not None:
        what = f" of {report.module!r}" if report.module else ""
        left = f"{report.macs_kept:.1%} of the prunable MACs are left"
        return f"Compression{what} after {report.step} optimizer steps: {left}"
    assert history is not None
    return f"No units were removed. The model was looked at {len(history.steps)} times in {history.steps[-1]} steps."


def _numbers(report: CompressionReport) -> list[tuple[str, Cell, Cell, Cell]]:
    """Rows of the table of numbers: what, before, after, ratio."""
    rows = [
        ("parameters", *_pair(report.params, lambda n: f"{n:,}")),
        ("MACs of an example", *_pair(report.macs, si)),
        ("MACs in structures", *_pair(report.prunable_macs, si)),
        ("file", *_pair(report.bytes, byte_size)),
    ]
    left = _percent(report.macs_kept)
    rows.append(("part of the MACs in structures", Cell("100.0%", 1.0), left, _ratio(1.0, report.macs_kept)))
    if report.training_speedup is not None:
        faster = Cell(f"{report.training_speedup:.2f}x", report.training_speedup)
        rows.append(("training step, medians in the table of removals", Cell(""), Cell(""), faster))
    for call, (before, after) in report.latency.items():
        rows.append((f"latency, {call}", *_pair((before.seconds, after.seconds), _milliseconds)))
        rows.append((f"latency, {call}: shortest", *_pair((before.best, after.best), _milliseconds)))
        spread = (_percent(before.spread), _percent(after.spread))
        rows.append((f"latency, {call}: spread of the runs, as a part of the median", *spread, Cell("")))
        rows.append((f"latency, {call}: runs", _count(before.runs), _count(after.runs), Cell("")))
    return rows


def _pair(values: tuple[Any, Any], show: Any) -> tuple[Cell, Cell, Cell]:
    return Cell(show(values[0]), values[0]), Cell(show(values[1]), values[1]), _ratio(*values)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _ratio(before: float, after: float) -> Cell:
    return Cell(ratio(before, after), before / after if after else None)


def _structures(report: CompressionReport) -> list[tuple[str, str, Cell, Cell, Cell, str]]:
    return [
        (
            s.name,
            s.kind,
            _count(s.units),
            _count(s.kept),
            _percent(s.kept / s.units),
            s.tier or "",
        )
        for s in report.structures
    ]


def _rounds(report: CompressionReport) -> list[tuple[list[Cell], ...]]:
    """Rows of the table of removals; a field of it may have several numbers."""
    return [
        (
            [_count(r.step)],
            [Cell(f"{r.params:,}", r.params)],
            [_percent(r.macs_kept)],
            [Cell(f"{r.seconds:.2f} s", r.seconds)],
            *_step_time(r.before),
            *_step_time(r.after),
        )
        for r in report.rounds
    ]


def _step_time(time: Latency | None) -> tuple[list[Cell], list[Cell]]:
    """Of a training step the median with its spread, and the shortest with the number of steps."""
    if time is None:
        return [Cell("-")], [Cell("-")]
    return (
        [Cell(f"{time.seconds * 1e3:.2f} ms", time.seconds), Cell(f"± {time.spread:.1%}", time.spread)],
        [Cell(f"{time.best * 1e3:.2f} ms", time.best), Cell(f"of {time.runs}", time.runs)],
    )


def _tokens(tokens: TokenSummary | None, history: FitHistory | None) -> dict[str, Any] | None:
    """What is said of tokens; None without token pruning."""
    if tokens is None and history is not None and history.moments:
        tokens = history.moments[-1][1].tokens
    if tokens is None:
        return None
    whole, left = tokens.macs
    costs = [("MACs of the layers, all tokens", Cell(si(whole), whole)), ("with those that stay", Cell(si(left), left))]
    if tokens.dense_macs is not None:
        costs.insert(0, ("before structures were removed", Cell(si(tokens.dense_macs), tokens.dense_macs)))
    costs.append(("left by tokens that leave", _percent(tokens.macs_kept)))
    if tokens.macs_kept_overall is not None:
        costs.append(("left by tokens and structures together", _percent(tokens.macs_kept_overall)))
    names = ("5 %", "median", "95 %")
    costs += [(f"left of an example, {n}", _percent(q)) for n, q in zip(names, tokens.quantiles, strict=True)]
    layers = []
    for number, kept in enumerate(tokens.kept_per_layer):
        value = tokens.values[number] if number < len(tokens.values) else None
        layers.append((number + 1, _percent(kept), Cell("" if value is None else f"{value:.3g}", value)))
    return {
        "policy": tokens.policy,
        "examples": _count(tokens.examples),
        "length": Cell(f"{tokens.tokens:.1f}", tokens.tokens),
        "costs": costs,
        "layers": layers,
        "histogram": [_count(count) for count in tokens.histogram],
        "picture": _picture(token_picture(tokens), "Tokens that enter each layer, and MACs left of the examples"),
    }


def _progress(history: FitHistory) -> list[Picture]:
    """What changed over training."""
    found = []
    metrics = {n: [(s, v) for s, v in points if math.isfinite(v)] for n, points in history.metrics.items()}
    curves = metrics_picture(metrics, history.removals)
    if curves is not None:
        found.append(_picture(curves, "Logged metrics over training, through removal and fine-tuning"))
    if history.sparsity and history.steps:
        figure = history_picture(history.steps, history.sparsity, history.removals)
        found.append(_picture(figure, "Sparsity over training, of families of matrices and of every matrix"))
    return found


def _moments(history: FitHistory) -> list[tuple[str, int, list[Picture]]]:
    """Pictures of the model at the moments that matter; curves over the layers at the last one only."""
    last = len(history.moments) - 1
    return [(name, m.step, _moment(m, number == last)) for number, (name, m) in enumerate(history.moments)]


def _moment(maps: ModelMaps, last: bool) -> list[Picture]:
    drawn = [
        (block_picture(maps), "Blocks of the matrices, alive, partly dead, dead or gone"),
        (unit_picture(maps, "head"), "Norms of attention heads by layer"),
        (norm_picture(maps), "Histograms of norms of feed-forward units and channels"),
    ]
    if last:
        drawn.append((layer_picture(maps), "Sparsity of the matrices by layer"))
        drawn.append((bits_picture(maps), "Bits of the weights"))
    return [_picture(figure, f"{title}, step {maps.step}") for figure, title in drawn if figure is not None]


def _matrices(maps: ModelMaps) -> list[tuple[str, str, Cell, Cell, Cell, tuple[Cell, ...]]]:
    """Rows of the table of matrices."""
    return [
        (
            m.name,
            f"{m.shape[0]} x {m.shape[1]}",
            _percent(m.sparsity),
            _percent(m.removed),
            Cell(f"{m.bits:g}", m.bits),
            tuple(_count(count) for count in m.counts.values()),
        )
        for m in maps.matrices
    ]


def _count(value: int) -> Cell:
    return Cell(str(value), value)


def _percent(value: float) -> Cell:
    return Cell(f"{value:.1%}", value)


def _picture(figure: Any, title: str) -> Picture:
    return Picture(f"data:image/png;base64,{base64.b64encode(png(pixels(figure))).decode('ascii')}", title)


__all__ = ["check_html", "write_html"]
