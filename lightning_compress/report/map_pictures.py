"""Pictures of sparsity maps, drawn by matplotlib from plain arrays into figures of their own."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_compress.report.maps import ModelMaps, families, family
from lightning_compress.report.matrix_maps import ALIVE, DEAD, GONE, PARTLY, STATES, MatrixMap
from lightning_compress.report.pictures import token_picture
from lightning_compress.report.unit_maps import BINS, UnitMap, of_kinds

DPI = 100
WIDTH = 10.0  # of a figure, in inches
NAMES = 24  # so many curves have their names in a legend
COLOURS = {GONE: "#d4d4d4", DEAD: "#e07b39", PARTLY: "#9ecae1", ALIVE: "#08519c"}  # told apart without seeing colours

Figure = Any  # a matplotlib.figure.Figure
Curves = Mapping[str, Sequence[tuple[float, float]]]


def block_picture(maps: ModelMaps) -> Figure:
    """Every matrix with its blocks: alive, partly dead (the paler, the more of it), dead, or gone.

    Blocks are drawn in the original shape of the matrix, output units from top to bottom; long shapes are drawn
    shorter. Matrices that all layers of a stack have stand in one row, from the first layer to the last.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
    """
    colour = _colour_reader()
    sections = _sections(maps.matrices)
    deepest = max(len(row) for _, rows in sections for _, row in rows)
    label = 2.3 if any(name for _, rows in sections for name, _ in rows) else 0.1
    cell = min(1.2, (WIDTH - label) / max(6, deepest))
    heights = [[max(_fitted(m, 0.88 * cell)[1] for m in row) for _, row in rows] for _, rows in sections]
    high = 0.6 + sum(0.35 + sum(tall + 0.24 for tall in talls) for talls in heights)
    figure = _figure(WIDTH, high)
    axes = figure.add_axes((0, 0, 1, 1))
    top = 0.6
    for (title, rows), talls in zip(sections, heights, strict=True):
        axes.text(0.1, top + 0.1, _text(title), fontsize=9, va="center", weight="bold")
        top += 0.3
        for (name, row), tall in zip(rows, talls, strict=True):
            axes.text(0.15, top + tall / 2, _text(name), fontsize=7, va="center")
            for column, matrix in enumerate(row):
                middle = label + (column + 0.5) * cell
                width, height = _fitted(matrix, 0.88 * cell)
                x, y = middle - width / 2, top + (tall - height) / 2
                picture = _colours(matrix, colour)
                axes.imshow(picture, interpolation="nearest", aspect="auto", extent=(x, x + width, y + height, y))
                under = f"{matrix.sparsity:.0%}" if name else f"{_last(matrix.name)} {matrix.sparsity:.0%}"
                axes.text(middle, top + tall + 0.08, _text(under), fontsize=6, ha="center", va="center")
            top += tall + 0.24
        top += 0.05
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(high, 0)
    axes.set_axis_off()
    title = f"Blocks of the matrices at step {maps.step}: {maps.sparsity:.1%} gone or zero, {maps.removed:.1%} removed"
    axes.text(0.1, 0.25, title, fontsize=10, va="center")
    _states(axes, (ALIVE, PARTLY, DEAD, GONE), anchor=(1.0, 1 - 0.08 / high), loc="upper right")
    return figure


def unit_picture(maps: ModelMaps, kind: str = "head") -> Figure | None:
    """Norms of the units of one kind, one line for each structure (layer), one column for each unit; None without any.

    Units that are exactly zero and units that were removed have colours of their own.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
    """
    shown = of_kinds(maps.structures, kind)
    if not shown:
        return None
    colour = _colour_reader()
    scale, mappable = _scale(max((_largest(u) for u in shown), default=1.0) or 1.0)
    width = max(u.units for u in shown)
    rows = []
    for units in shown:
        row = [
            colour(COLOURS[GONE]) if norm != norm else colour(COLOURS[DEAD]) if norm == 0 else scale(norm)
            for norm in units.norms.tolist()
        ]
        rows.append([*row, *[(1.0, 1.0, 1.0)] * (width - units.units)])
    figure = _figure(WIDTH, 1.6 + 0.24 * len(rows), layout="constrained")
    axes = figure.subplots()
    axes.imshow(rows, interpolation="nearest", aspect="auto")
    axes.set_yticks(range(len(rows)), [_text(u.name) for u in shown], fontsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(f"{kind}, in the numbering of the model before removals")
    alive, total = sum(u.alive for u in shown), sum(u.units for u in shown)
    axes.set_title(
        f"Norms of units of kind {kind!r} at step {maps.step}: {alive} of {total} alive", fontsize=10, loc="left"
    )
    figure.colorbar(mappable, ax=axes, label="norm of all weights of the unit", shrink=0.9)
    _states(axes, (DEAD, GONE))
    return figure


def norm_picture(maps: ModelMaps, kinds: Sequence[str] = ("ffn", "channel")) -> Figure | None:
    """Histograms of the norms of feed-forward units (and channels), one line for each structure; None without any.

    The two bars behind a histogram are the units that are exactly zero and those that were removed.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
    """
    shown = of_kinds(maps.structures, *kinds)
    if not shown:
        return None
    colour = _colour_reader()
    upper = max(_largest(u) for u in shown) or 1.0
    figure = _figure(WIDTH, 1.4 + 0.42 * len(shown), layout="constrained")
    axes = figure.subplots()
    for line, units in enumerate(shown):
        counts, borders = units.histogram(upper)
        # every line is as high as its fullest bin would be with half of the units in it
        tall = [min(0.95, 1.9 * count / units.units) for count in counts]
        base = len(shown) - 1 - line
        axes.bar(borders[:-1], tall, upper / BINS, bottom=base, align="edge", color=COLOURS[ALIVE])
        for place, (state, count) in enumerate(((DEAD, units.dead), (GONE, units.removed))):
            left = upper * (1.03 + 0.05 * place)
            axes.bar(
                [left], [0.95 * count / units.units], upper / BINS, bottom=base, align="edge", color=COLOURS[state]
            )
    names = [f"{_text(u.name)}\n{u.alive} of {u.units}" for u in reversed(shown)]
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.set_ylim(-0.05, len(shown))
    axes.set_xlim(0, upper * 1.14)
    numbers = [x for x in axes.get_xticks() if x <= upper]
    behind = [upper * (1.03 + 0.05 * place) + upper / BINS / 2 for place in (0, 1)]
    axes.set_xticks([*numbers, *behind], [*(f"{x:g}" for x in numbers), STATES[DEAD], STATES[GONE]], fontsize=8)
    axes.grid(axis="y", color=colour("#cccccc"), linewidth=0.5)
    axes.set_xlabel("norm of all weights of the unit")
    axes.set_title(f"Norms of feed-forward units and channels at step {maps.step}", fontsize=10, loc="left")
    _states(axes, (ALIVE, DEAD, GONE))
    return figure


def layer_picture(maps: ModelMaps) -> Figure:
    """Sparsity of every matrix over its place in the stack: one curve for each matrix that all layers have.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
    """
    _colour_reader()
    curves = {
        name: [(depth, 100 * value) for depth, value in sorted(points.items())]
        for name, points in families({m.name: m.sparsity for m in maps.matrices}).items()
    }
    title = f"Sparsity by layer at step {maps.step}: {maps.sparsity:.1%} of all matrices, {maps.removed:.1%} removed"
    return _curves(curves, title, "layer", "% of the matrix that is gone or zero", limits=(-2, 102))


def history_picture(
    steps: Sequence[int], sparsity: Mapping[str, Sequence[float]], removals: Sequence[int] = ()
) -> Figure:
    """Sparsity of every matrix over training, one line of colours each, and the means of their families as curves.

    Args:
        steps: optimizer steps of the moments, (moments,), increasing.
        sparsity: name of a matrix -> part of it that was gone or zero, (moments,).
        removals: steps of removals.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
    """
    _colour_reader()
    means: dict[str, list[list[float]]] = {}
    for name, values in sparsity.items():
        means.setdefault(family(name)[0], []).append(list(values))
    curves = {
        name: [
            (step, 100 * sum(column) / len(column)) for step, column in zip(steps, zip(*rows, strict=True), strict=True)
        ]
        for name, rows in means.items()
    }
    figure = _curves(
        curves,
        "Sparsity over training, means over the layers",
        "optimizer steps",
        "% that is gone or zero",
        limits=(-2, 102),
        lines=removals,
        height=4.5 + 0.09 * len(sparsity),
        below=0.09 * len(sparsity) + 0.8,
    )
    axes = figure.axes[1]
    axes.pcolormesh(_edges(len(steps)), _edges(len(sparsity)), [*sparsity.values()], vmin=0, vmax=1, cmap="Blues_r")
    axes.invert_yaxis()
    axes.set_xticks(range(len(steps)), [str(s) for s in steps], fontsize=6, rotation=90)
    axes.set_yticks(range(len(sparsity)), [_text(name) for name in sparsity], fontsize=5)
    axes.set_xlabel("optimizer steps at which the model was looked at; dark: whole, white: nothing left", fontsize=8)
    return figure


def bits_picture(maps: ModelMaps) -> Figure:
    """Bits of the elements of every matrix, one bar each.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
    """
    _colour_reader()
    figure = _figure(WIDTH, 1.4 + 0.16 * len(maps.matrices), layout="constrained")
    axes = figure.subplots()
    names = [_text(m.name) for m in maps.matrices]
    axes.barh(range(len(names)), [m.bits for m in maps.matrices], color=COLOURS[ALIVE])
    for number, matrix in enumerate(maps.matrices):
        axes.text(matrix.bits, number, f" {matrix.bits:g}", va="center", fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("bits of an element, scales left out")
    axes.set_title(f"Bits of weights at step {maps.step}: {maps.mean_bits:.2f} in the mean", fontsize=10)
    return figure


def metrics_picture(metrics: Curves, removals: Sequence[int] = ()) -> Figure | None:
    """Logged metrics over training, each in axes of its own, with the removals as dashed lines; None without any.

    Args:
        metrics: name -> (optimizer steps, value) in the order of the steps.
        removals: steps of removals.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
    """
    _colour_reader()
    shown = {name: points for name, points in metrics.items() if points}
    if not shown:
        return None
    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = _figure(WIDTH, 0.4 + 2.4 * rows, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number >= len(shown):
            axes.set_axis_off()
            continue
        name, points = list(shown.items())[number]
        axes.plot([step for step, _ in points], [value for _, value in points], marker=".", color=COLOURS[ALIVE])
        for step in removals:
            axes.axvline(step, color="black", linestyle="--", linewidth=1)
        axes.set_title(_text(name), fontsize=9)
        axes.set_xlabel("optimizer steps (dashed: a removal)" if removals else "optimizer steps", fontsize=8)
    return figure


def draw_maps(maps: ModelMaps) -> dict[str, Figure]:
    """All pictures of one moment by kind: blocks, heads, norms, layers, bits, tokens, as far as there is something.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
    """
    found = {
        "blocks": block_picture(maps),
        "heads": unit_picture(maps, "head"),
        "norms": norm_picture(maps),
        "layers": layer_picture(maps),
        "bits": bits_picture(maps),
        "tokens": None if maps.tokens is None else token_picture(maps.tokens),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def pixels(figure: Figure) -> Any:
    """A figure as an array of bytes, uint8 (height, width, 3), as image loggers take it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    import numpy

    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


def png(array: Any) -> bytes:
    """An array of `pixels` as a PNG file."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, array, format="png")
    return file.getvalue()


def check_matplotlib() -> None:
    """Raise ImportError, naming the extra, unless matplotlib can be imported."""
    _colour_reader()


def _colour_reader() -> Any:
    try:
        from matplotlib.colors import to_rgb
    except ImportError as error:
        raise ImportError(
            f"Expected matplotlib to be installed for a picture, but it cannot be imported ({error}). "
            "Install the extra: pip install 'lightning-compress[report]'."
        ) from error
    return to_rgb


def _figure(width: float, height: float, **options: Any) -> Figure:
    from matplotlib.figure import Figure as Made

    return Made(figsize=(width, min(height, 200.0)), dpi=DPI, facecolor="white", **options)


def _colours(matrix: MatrixMap, colour: Any) -> list[list[tuple[float, ...]]]:
    """A colour for each block; of those that are partly dead the paler, the less of it is alive."""
    alive, partly = colour(COLOURS[ALIVE]), (0.87, 0.92, 0.97)
    whole = {state: colour(COLOURS[state]) for state in COLOURS}
    return [
        [
            tuple(p + share * 0.75 * (a - p) for a, p in zip(alive, partly, strict=True))
            if state == PARTLY
            else whole[state]
            for state, share in zip(states, shares, strict=True)
        ]
        for states, shares in zip(matrix.states.tolist(), matrix.alive.tolist(), strict=True)
    ]


def _sections(matrices: Sequence[MatrixMap]) -> list[tuple[str, list[tuple[str, list[MatrixMap]]]]]:
    """Stacks with their rows: (name, [(name of what all layers have, one matrix for each layer), ...])."""
    stacks: dict[str, dict[str, list[MatrixMap]]] = {}
    single: list[MatrixMap] = []
    for matrix in matrices:
        name, _ = family(matrix.name)
        stack, star, inner = name.partition("*")
        if star:
            stacks.setdefault(f"{stack}*", {}).setdefault(inner.removeprefix("."), []).append(matrix)
        else:
            single.append(matrix)
    found = [(stack, list(rows.items())) for stack, rows in stacks.items()]
    if single:
        wide = max(6, *(len(row) for _, rows in found for _, row in rows)) if found else 8
        lines = [("", single[first : first + wide]) for first in range(0, len(single), wide)]
        found.append(("other matrices" if found else "matrices", lines))
    return found


def _fitted(matrix: MatrixMap, side: float) -> tuple[float, float]:
    """Width and height of a matrix in a square; none is drawn thinner than one to three."""
    ratio = min(3.0, max(1 / 3, matrix.shape[1] / max(1, matrix.shape[0])))
    return (side, side / ratio) if ratio >= 1 else (side * ratio, side)


def _text(name: str) -> str:
    """A name as it is written: no mathematics between dollars, and not hidden for its underscore."""
    return name.replace("$", r"\$") if not name.startswith("_") else " " + name.replace("$", r"\$")


def _last(name: str) -> str:
    """The end of a name, where there is no room for all of it."""
    return name.removesuffix(".weight")[-14:]


def _states(
    axes: Any, states: Sequence[int], anchor: tuple[float, float] = (1.0, 1.0), loc: str = "lower right"
) -> None:
    """A legend of states, in one line above the axes."""
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOURS[state], label=STATES[state]) for state in states]
    axes.legend(handles=handles, loc=loc, bbox_to_anchor=anchor, ncols=len(states), fontsize=8, frameon=False)


def _scale(upper: float) -> tuple[Any, Any]:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    mappable: Any = ScalarMappable(Normalize(0, upper, clip=True), "viridis")
    return (lambda norm: mappable.to_rgba(norm)[:3]), mappable


def _largest(units: UnitMap) -> float:
    finite = units.norms[units.norms.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def _edges(count: int) -> list[float]:
    return [number - 0.5 for number in range(count + 1)]


def _curves(
    curves: Curves,
    title: str,
    across: str,
    up: str,
    limits: tuple[float, float],
    lines: Sequence[int] = (),
    height: float = 4.5,
    below: float = 0.0,
) -> Figure:
    """Many curves in one pair of axes, with room for others below them."""
    figure = _figure(WIDTH, height, layout="constrained")
    if below:
        axes, _ = figure.subplots(2, 1, height_ratios=(height - below, below))
    else:
        axes = figure.subplots()
    styles = ("-", "--", ":", "-.")
    for number, (name, points) in enumerate(curves.items()):
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            styles[number // 10 % len(styles)],
            marker=".",
            label=_text(name) if number < NAMES else None,
        )
    for step in lines:
        axes.axvline(step, color="black", linestyle="--", linewidth=1)
    axes.set_ylim(*limits)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if curves:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=6)
    return figure


__all__ = [
    "bits_picture",
    "block_picture",
    "check_matplotlib",
    "draw_maps",
    "history_picture",
    "layer_picture",
    "metrics_picture",
    "norm_picture",
    "pixels",
    "png",
    "unit_picture",
]
