"""Draw what MiSSe and MiSS add to a weight, from the library itself.

``python docs/pictures.py`` writes the two SVG files. Each matrix that is drawn is the
``delta_weight()`` of a small layer whose D holds the numbers 1, 2, 3, and so on. A cell shows its
number, and its colour says which column of D (MiSSe) or which row (MiSS) it comes from.
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
# Of Okabe and Ito's colours those on which black text is legible.
COLOURS = ("#E69F00", "#56B4E9", "#F0E442")
SETTINGS = {"svg.hashsalt": "miss", "svg.fonttype": "path"}
SETTINGS |= {"font.size": 9, "font.family": "DejaVu Sans"}
CENTRED = {"ha": "center", "va": "center"}
CELL = 0.205  # inches: a picture is 3.5 inches wide, so that a phone shows it whole
Rows = tuple[tuple[int, int, int, str], ...]  # in_features, out_features, rank, title of each layer
MISSE: Rows = (
    (9, 5, 3, "MiSSe, even: 9 columns, rank 3"),
    (8, 5, 3, "MiSSe, ragged: 8 columns, rank 3"),
)
MISS: Rows = (
    (6, 9, 3, "MiSS, even: 9 rows, 3 shards of 3"),
    (6, 11, 3, "MiSS, uneven: 11 rows, shards of 4, 4 and 3"),
)
# Of D and of the delta: title, and labels of the axes. By whether D is shared along the input.
DELTA = ("ΔW", "input column c", "output row o")
LABELS = {
    True: (("D", "j", "output row o"), DELTA),
    False: (("D", "input column c", "shard k"), DELTA),
}
# For each form: its class, whether D is shared along the input, and its layers.
PICTURES: dict[str, tuple[type, bool, Rows]] = {
    "delta_misse": (MiSSeLinear, True, MISSE),
    "delta_miss": (MiSSLinear, False, MISS),
}


def layer(form: type, in_features: int, out_features: int, rank: int) -> Any:
    """A layer whose D holds 1, 2, 3, and so on."""
    made = form(in_features, out_features, rank, bias=False)
    with torch.no_grad():
        made.miss_D.copy_(torch.arange(1.0, made.miss_D.numel() + 1).reshape(made.miss_D.shape))
    return made


def draw(axis: Any, matrix: Tensor, d: Tensor, by_column: bool) -> None:
    """Draw a matrix of numbers of ``d``.

    It is coloured by the column or the row of ``d`` that each number stands in.
    """
    place = torch.arange(d.shape[1])[None] if by_column else torch.arange(d.shape[0])[:, None]
    place = place.expand(d.shape).flatten()
    values = matrix.detach().numpy()
    colours = ListedColormap([COLOURS[int(index)] for index in place])
    norm = BoundaryNorm([number + 0.5 for number in range(len(place) + 1)], len(place))
    axis.pcolormesh(values, cmap=colours, norm=norm, edgecolors="white", linewidth=1)
    for row, numbers in enumerate(values):
        for column, number in enumerate(numbers):
            axis.text(column + 0.5, row + 0.5, f"{number:.0f}", **CENTRED, fontsize=7)
    high, wide = values.shape
    axis.set(xlim=(0, wide), ylim=(high, 0), aspect="equal")
    axis.set_xticks([index + 0.5 for index in range(wide)])
    axis.set_xticklabels([str(index) for index in range(wide)], fontsize=7)
    axis.set_yticks([index + 0.5 for index in range(high)])
    axis.set_yticklabels([str(index) for index in range(high)], fontsize=7)
    axis.tick_params(length=0, pad=1)
    axis.spines[:].set_visible(False)


def draw_cuts(axis: Any, made: Any, by_column: bool) -> None:
    """Draw lines between the blocks of columns of a delta (MiSSe), or between its shards (MiSS)."""
    line = {"color": "black", "linewidth": 1.6}
    if by_column:
        for column in range(made.rank, made.in_features, made.rank):
            axis.axvline(column, **line)
        return
    size, longer = divmod(made.out_features, made.rank)
    for shard in range(1, made.rank):
        axis.axhline(shard * size + min(shard, longer), **line)


def figure(name: str) -> Figure:
    """One picture: for each of its layers D, and beside it the delta that D makes."""
    form, by_column, rows = PICTURES[name]
    layers = [layer(form, *row[:3]) for row in rows]
    width = max(made.miss_D.shape[1] + made.in_features for made in layers) + 5.2
    heights = [made.out_features + 4.6 for made in layers]
    whole = top = sum(heights)
    with matplotlib.rc_context(matplotlib.rcParamsDefault | SETTINGS):
        drawn = Figure(figsize=(width * CELL, whole * CELL), facecolor="white")
        for made, height, (*_, title) in zip(layers, heights, rows):
            left, matrices = 2.2, (made.miss_D, made.delta_weight())
            for matrix, (label, across, down) in zip(matrices, LABELS[by_column]):
                high, wide = matrix.shape
                box = left / width, (top - 2.4 - high) / whole, wide / width, high / whole
                axis = drawn.add_axes(box)
                draw(axis, matrix, made.miss_D, by_column)
                axis.set_title(label, fontsize=9, pad=3)
                axis.set_xlabel(across, fontsize=8, labelpad=1)
                axis.set_ylabel(down, fontsize=8, labelpad=1)
                left += wide + 2.6
            draw_cuts(axis, made, by_column)  # in the last one, the delta's
            drawn.text(0.5, (top - 0.7) / whole, title, **CENTRED, fontsize=9, fontweight="bold")
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
