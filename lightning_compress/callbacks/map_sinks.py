"""Where sparsity maps go: Weights & Biases, TensorBoard, or files in a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from lightning_compress.report.map_pictures import png
from lightning_compress.report.maps import ModelMaps
from lightning_compress.report.matrix_maps import STATES

PREFIX = "sparsity_maps"
COLUMNS = ("matrix", "rows", "columns", "sparsity", "removed", "bits", *(f"blocks {state}" for state in STATES))
ARRAYS = "maps.json"
_OWN = re.compile(r"\d{3,}_step\d+_[a-z]+\.png")


class Sink(Protocol):
    """Takes what is drawn."""

    def show(self, maps: ModelMaps, drawn: Mapping[str, Any], moment: str | None) -> None:
        """Take the maps of one moment, and its pictures by kind as arrays, uint8 (height, width, 3)."""

    def finish(self, summary: Mapping[str, float], report: Path | None, step: int) -> None:
        """Take the last numbers, and the path of the HTML report if there is one."""


class WandbSink:
    """One panel for each kind of picture, whose slider goes over the steps; a table, histograms and a summary."""

    def __init__(self, logger: WandbLogger) -> None:
        self.logger = logger

    def show(self, maps: ModelMaps, drawn: Mapping[str, Any], moment: str | None) -> None:
        """Log everything of one moment at once, so that it lies at one position of the slider."""
        import wandb

        caption = f"step {maps.step}" if moment is None else f"{moment}, step {maps.step}"
        values: dict[str, Any] = {f"{PREFIX}/{kind}": wandb.Image(a, caption=caption) for kind, a in drawn.items()}
        values[f"{PREFIX}/matrices"] = wandb.Table(columns=list(COLUMNS), data=table(maps))
        for units in maps.structures:
            if units.kind in ("ffn", "channel"):
                counts, borders = units.histogram()
                values[f"{PREFIX}/norms_of/{units.name}"] = wandb.Histogram(np_histogram=(list(counts), list(borders)))
        values.update(maps.metrics())
        self.logger.experiment.log({**values, "trainer/global_step": maps.step})

    def finish(self, summary: Mapping[str, float], report: Path | None, step: int) -> None:
        """Summary values, and the report as a page."""
        import wandb

        run = self.logger.experiment
        if report is not None:
            # without what wandb would add to it: styles from its own server
            page = wandb.Html(report.read_text(encoding="utf-8"), inject=False)
            run.log({f"{PREFIX}/report": page, "trainer/global_step": step})
        run.summary.update(dict(summary))


class TensorBoardSink:
    """Images and scalars."""

    def __init__(self, logger: TensorBoardLogger) -> None:
        self.logger = logger

    def show(self, maps: ModelMaps, drawn: Mapping[str, Any], moment: str | None) -> None:
        """One image for each kind; the headline numbers, and the sparsity of each matrix."""
        writer = self.logger.experiment
        for kind, array in drawn.items():
            writer.add_image(f"{PREFIX}/{kind}", array, maps.step, dataformats="HWC")
        scalars = {**maps.metrics(), **{f"{PREFIX}/sparsity_of/{m.name}": m.sparsity for m in maps.matrices}}
        for name, value in scalars.items():
            writer.add_scalar(name, value, maps.step)

    def finish(self, summary: Mapping[str, float], report: Path | None, step: int) -> None:
        """The last numbers as scalars."""
        for name, value in summary.items():
            self.logger.experiment.add_scalar(name, value, step)
        self.logger.experiment.flush()


class FolderSink:
    """PNG files, numbered, and the arrays of all moments as one JSON file, which is whole after each of them.

    Args:
        folder: made if it is not there.
        done: moments of a fit that is resumed; what was written later is written anew. 0 for a new fit, which replaces
            the files of an earlier one.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        self.folder, self.count = folder, done
        folder.mkdir(parents=True, exist_ok=True)
        self._arrays = folder / ARRAYS
        for file in folder.iterdir():
            if _OWN.fullmatch(file.name) and int(file.name.partition("_")[0]) >= done:
                file.unlink()
        kept: list[Any] = []
        if done and self._arrays.exists():
            kept = json.loads(self._arrays.read_text(encoding="utf-8"))[:done]
        self._arrays.write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n", encoding="utf-8")
        self._empty = not kept

    def show(self, maps: ModelMaps, drawn: Mapping[str, Any], moment: str | None) -> None:
        """Write the pictures, and append the arrays."""
        for kind, array in drawn.items():
            (self.folder / f"{self.count:03d}_step{maps.step}_{kind}.png").write_bytes(png(array))
        self.count += 1
        record = json.dumps({"moment": moment, **maps.to_dict()})
        with self._arrays.open("r+b") as file:
            file.seek(-len(b"\n]\n"), 2)  # over the end of the list
            file.write((("" if self._empty else ",\n") + record + "\n]\n").encode())
        self._empty = False

    def finish(self, summary: Mapping[str, float], report: Path | None, step: int) -> None:
        """Everything has been written."""


def table(maps: ModelMaps) -> list[list[Any]]:
    """Rows of the table of matrices, under COLUMNS."""
    return [
        [m.name, *m.shape, m.sparsity, m.removed, m.bits, *(m.counts[state] for state in STATES)] for m in maps.matrices
    ]


def sinks_for(loggers: Sequence[Logger], folder: Path, explicit: bool, done: int) -> list[Sink]:
    """Where maps go.

    Args:
        loggers: those of the Trainer.
        folder: for files.
        explicit: whether files were asked for; otherwise they are written where no logger takes pictures.
        done: see `FolderSink`.
    """
    found: list[Sink] = []
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            found.append(WandbSink(logger))
        elif isinstance(logger, TensorBoardLogger):
            found.append(TensorBoardSink(logger))
    if explicit or not found:
        found.append(FolderSink(folder, done))
    return found


__all__ = ["ARRAYS", "COLUMNS", "PREFIX", "FolderSink", "Sink", "TensorBoardSink", "WandbSink", "sinks_for", "table"]
