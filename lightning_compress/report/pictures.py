"""Pictures of reports, drawn by matplotlib into figures of their own: nothing of its global state is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_compress.report.tokens import TokenSummary


def token_picture(summary: TokenSummary) -> Any:
    """Which share of the tokens enters each layer, and how many examples have which share of their MACs left.

    Args:
        summary: the numbers, as `TokenPruning` has them in ``summary`` and a `CompressionReport` in ``tokens``.

    Returns:
        A ``matplotlib.figure.Figure`` with two axes: a curve over the layers, in % of the real tokens, and a histogram
        over the examples, in % of the multiply-accumulates of the layers with all real tokens.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"Expected matplotlib to be installed for a picture, but it cannot be imported ({error}). "
            "Install the extra: pip install 'lightning-compress[report]'."
        ) from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    curve, bars = figure.subplots(1, 2)

    layers = range(1, len(summary.kept_per_layer) + 1)
    curve.plot(layers, [100 * kept for kept in summary.kept_per_layer], marker="o")
    curve.set_ylim(0, 105)
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.set_title(f"Tokens that enter each layer, by {summary.policy}")
    curve.set_xlabel("layer")
    curve.set_ylabel("% of the tokens of all examples")

    width = 100 / len(summary.histogram)
    left = [width * number for number in range(len(summary.histogram))]
    bars.bar(left, summary.histogram, width, align="edge", edgecolor="white")
    median = 100 * summary.quantiles[1]
    bars.axvline(median, color="black", linestyle="--", linewidth=1, label=f"median, {median:.1f} %")
    bars.set_xlim(0, 100)
    bars.yaxis.get_major_locator().set_params(integer=True)
    bars.set_title(f"MACs that are left of each of {summary.examples} examples")
    bars.set_xlabel("% of the MACs of the layers with all tokens")
    bars.set_ylabel("examples")
    bars.legend()
    return figure


def save_token_picture(summary: TokenSummary, path: str | Path) -> None:
    """Save `token_picture` as a file.

    Args:
        summary: the numbers.
        path: of the file, in a folder that is there; its suffix says the format, .png, .svg or .pdf for example.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
        ValueError: if matplotlib does not know the suffix.
    """
    token_picture(summary).savefig(path)


__all__ = ["save_token_picture", "token_picture"]
