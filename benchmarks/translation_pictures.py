"""Pictures of what dies under the block-wise group lasso in the translation benchmark.

    python benchmarks/translation_pictures.py          # docs/pictures/bssl_blocks.png and bssl_lines.png
    python benchmarks/translation_pictures.py --variant bssl-slab-1    # bssl_slab_1_blocks.png and ..._lines.png

Drawn from the norms in `benchmarks/results/translation/maps`, which `python benchmarks/translation.py --all --study
bssl` writes; nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import translation  # noqa: E402
from lightning_compress.regularizers.blocks import block_borders  # noqa: E402
from lightning_compress.report.map_pictures import block_picture  # noqa: E402
from lightning_compress.report.maps import ModelMaps, families  # noqa: E402
from lightning_compress.report.matrix_maps import MatrixMap  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
VARIANT = "bssl-square-1"


def living_lines(run: translation.Run) -> dict[str, tuple[Tensor, Tensor]]:
    """Which rows (out_features, blocks along in) and columns (blocks along out, in_features) of blocks are alive."""
    if not run.maps.is_file():
        raise SystemExit(f"Expected {run.maps}: python benchmarks/translation.py {' '.join(run.arguments)} writes it.")
    with numpy.load(run.maps, allow_pickle=False) as file:
        norms = {name: torch.from_numpy(file[name]).double() for name in file.files}
    found = {}
    for name in dict.fromkeys(name.rpartition(".")[0] for name in norms):
        found[name] = translation.living_lines(norms[f"{name}.rows"], norms[f"{name}.columns"])
    return found


def maps_of(run: translation.Run) -> ModelMaps:
    """The blocks of all matrices at the end of a run."""
    matrices = []
    for name, (rows, columns) in living_lines(run).items():
        last = name.rpartition(".")[2]
        kind = "attn" if last in ("query", "key", "value") else last
        shape = rows.shape[0], columns.shape[1]
        borders = block_borders(torch.zeros(shape), **translation.blocks_of(run, kind))
        high, wide = (torch.tensor(side).diff().tolist() for side in borders)
        of_rows = torch.stack([part.double().mean(0) for part in rows.split(high)])  # (blocks out, blocks in)
        of_columns = torch.stack([part.double().mean(1) for part in columns.split(wide, 1)], 1)
        alive = of_rows * of_columns
        elements = torch.tensor(high).unsqueeze(1) * torch.tensor(wide)
        sparsity = 1 - float((alive * elements).sum() / elements.sum())
        matrices.append(MatrixMap(name, shape, borders, alive, torch.zeros_like(alive), sparsity, 0.0, 32.0))
    steps = json.loads(run.result.read_text())["steps"]
    return ModelMaps(steps, tuple(matrices))


def dead_shares(run: translation.Run) -> dict[str, tuple[dict[str, list[float]], dict[str, list[float]]]]:
    """For encoder and decoder, the dead part of rows and of columns of each kind of matrix, layer by layer."""
    living = living_lines(run)
    sides = [
        families({name: 1 - float(lines[side].double().mean()) for name, lines in living.items()}) for side in (0, 1)
    ]
    found: dict[str, Any] = {}
    for stack in ("encoder", "decoder"):
        start = f"{stack}.layers.*."
        found[stack] = tuple(
            {
                name.removeprefix(start): [parts[n] for n in sorted(parts)]
                for name, parts in side.items()
                if name.startswith(start)
            }
            for side in sides
        )
    return found


def line_picture(run: translation.Run) -> Figure:
    """Percent of dead rows and columns of blocks, by matrix and layer, of encoder and decoder."""
    stacks = dead_shares(run)
    heights = [len(rows) for rows, _ in stacks.values()]
    figure = Figure(figsize=(9, 1.6 + 0.32 * sum(heights)), dpi=100, facecolor="white", layout="constrained")
    axes = figure.subplots(2, 2, squeeze=False, height_ratios=heights)
    for line, (stack, sides) in zip(axes, stacks.items(), strict=True):
        for axis, side, words in zip(line, sides, ("output units (rows)", "input units (columns)"), strict=True):
            values = 100 * numpy.array(list(side.values()))
            axis.imshow(values, cmap="Oranges", vmin=0, vmax=100, aspect="auto")
            for (row, column), value in numpy.ndenumerate(values):
                colour = "white" if value > 60 else "black"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
            axis.set_xticks(range(values.shape[1]), [f"layer {n + 1}" for n in range(values.shape[1])], fontsize=8)
            axis.set_yticks(range(len(side)), list(side), fontsize=8)
            axis.set_title(f"{stack}: {words}", fontsize=9)
    figure.suptitle(f"Percent of the lines of blocks that are dead, {run.variant}, {run.size}", fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    variants = [name for name, variant in translation.VARIANTS.items() if variant.study == "bssl"]
    parser.add_argument("--variant", choices=variants, default=VARIANT)
    parser.add_argument("--size", choices=tuple(translation.SCHEDULES), default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=PICTURES)
    arguments = parser.parse_args()
    run = translation.Run(arguments.variant, arguments.seed, arguments.size)
    prefix = "bssl" if run.variant == VARIANT else run.variant.replace("-", "_").replace(".", "_")
    pictures = {f"{prefix}_blocks": block_picture(maps_of(run)), f"{prefix}_lines": line_picture(run)}
    for name, figure in pictures.items():
        figure.savefig(arguments.folder / f"{name}.png")
        print(arguments.folder / f"{name}.png")


if __name__ == "__main__":
    main()
