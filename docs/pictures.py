"""Draw what MiSSe and MiSS add to a weight, from the library itself: ``python docs/pictures.py`` writes the two SVG files.

Each matrix that is drawn is the ``delta_weight()`` of a small layer whose D holds the numbers 1, 2, 3, and so on. A cell shows
its number, and its colour says which column of D (MiSSe) or which row (MiSS) it comes from.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from miss import MiSSeLinear, MiSSLinear

FIGURES = Path(__file__).parent / "figures"
COLOURS = (
    "#E69F00",
    "#56B4E9",
    "#F0E442",
)  # of Okabe and Ito, those on which black text is legible
SETTINGS = {
    "svg.hashsalt": "miss",
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "path",
}
CELL = 0.205  # inches: a picture is 3.5 inches wide, so that a phone shows it whole
# For each form: its class, whether D is shared along the input, and (in_features, out_features, rank, title) of each layer.
PICTURES: dict[str, tuple[type, bool, tuple[tuple[int, int, int, str], ...]]] = {
    "delta_misse": (
        MiSSeLinear,
        True,
        (
            (9, 5, 3, "MiSSe, even: 9 columns, rank 3"),
            (8, 5, 3, "MiSSe, ragged: 8 columns, rank 3"),
        ),
    ),
    "delta_miss": (
        MiSSLinear,
        False,
        (
            (6, 9, 3, "MiSS, even: 9 rows, 3 shards of 3"),
            (6, 11, 3, "MiSS, uneven: 11 rows, shards of 4, 4 and 3"),
        ),
    ),
}


def layer(form: type, in_features: int, out_features: int, rank: int) -> Any:
    """A layer whose D holds 1, 2, 3, and so on."""
    made = form(in_features, out_features, rank, bias=False)
    with torch.no_grad():
        made.miss_D.copy_(torch.arange(1.0, made.miss_D.numel() + 1).reshape(made.miss_D.shape))
    return made


def draw(axis: Any, matrix: Tensor, d: Tensor, by_column: bool) -> None:
    """Draw a matrix of numbers of ``d``, coloured by the column or the row of ``d`` that each number stands in."""
    place = (
        (torch.arange(d.shape[1])[None] if by_column else torch.arange(d.shape[0])[:, None])
        .expand(d.shape)
        .flatten()
    )
    values = matrix.detach().numpy()
    colours = ListedColormap([COLOURS[int(index)] for index in place])
    norm = BoundaryNorm([number + 0.5 for number in range(len(place) + 1)], len(place))
    axis.pcolormesh(values, cmap=colours, norm=norm, edgecolors="white", linewidth=1)
    for row, numbers in enumerate(values):
        for column, number in enumerate(numbers):
            axis.text(
                column + 0.5, row + 0.5, f"{number:.0f}", ha="center", va="center", fontsize=7
            )
    axis.set(xlim=(0, values.shape[1]), ylim=(values.shape[0], 0), aspect="equal")
    for ticks, labels, size in (
        (axis.set_xticks, axis.set_xticklabels, 1),
        (axis.set_yticks, axis.set_yticklabels, 0),
    ):
        ticks([index + 0.5 for index in range(values.shape[size])])
        labels([str(index) for index in range(values.shape[size])], fontsize=7)
    axis.tick_params(length=0, pad=1)
    axis.spines[:].set_visible(False)


def figure(name: str) -> Figure:
    """One picture: for each of its layers D, and beside it the delta that D makes."""
    form, by_column, rows = PICTURES[name]
    layers = [layer(form, *row[:3]) for row in rows]
    width = max(made.miss_D.shape[1] + made.in_features for made in layers) + 5.2
    heights = [made.out_features + 4.6 for made in layers]
    with matplotlib.rc_context(matplotlib.rcParamsDefault | SETTINGS):
        drawn = Figure(figsize=(width * CELL, sum(heights) * CELL), facecolor="white")
        top = sum(heights)
        for made, height, (*_, title) in zip(layers, heights, rows):
            columns = 2.2
            for matrix, label, across, down in (
                (
                    made.miss_D,
                    "D",
                    "j" if by_column else "input column c",
                    "output row o" if by_column else "shard k",
                ),
                (made.delta_weight(), "ΔW", "input column c", "output row o"),
            ):
                high, wide = matrix.shape
                box = (
                    columns / width,
                    (top - 2.4 - high) / sum(heights),
                    wide / width,
                    high / sum(heights),
                )
                axis = drawn.add_axes(box)
                draw(axis, matrix, made.miss_D, by_column)
                axis.set_title(label, fontsize=9, pad=3)
                axis.set_xlabel(across, fontsize=8, labelpad=1)
                axis.set_ylabel(down, fontsize=8, labelpad=1)
                rank = made.rank
                sizes = [
                    made.out_features // rank + (shard < made.out_features % rank)
                    for shard in range(rank)
                ]
                if label == "ΔW" and by_column:
                    for cut in range(rank, wide, rank):
                        axis.axvline(cut, color="black", linewidth=1.6)
                elif label == "ΔW":
                    for shard in range(1, rank):
                        axis.axhline(sum(sizes[:shard]), color="black", linewidth=1.6)
                columns += wide + 2.6
            drawn.text(
                0.5,
                (top - 0.7) / sum(heights),
                title,
                ha="center",
                va="center",
                fontsize=9,
                fontweight="bold",
            )
            top -= height
    return drawn


def save(name: str, folder: Path, suffix: str = "svg") -> Path:
    """Write a picture; the file is the same each time."""
    path = folder / f"{name}.{suffix}"
    with matplotlib.rc_context(matplotlib.rcParamsDefault | SETTINGS):
        figure(name).savefig(path, metadata={"Date": None} if suffix == "svg" else None, dpi=200)
    return path


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURES
    folder.mkdir(exist_ok=True)
    for each in PICTURES:
        print(save(each, folder))
