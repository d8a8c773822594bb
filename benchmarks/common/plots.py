"""One style for all figures.

Each method has its colour, marker and line everywhere. Axes have units, and intervals are drawn.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.methods import (
    ADALORA,
    ALTERNATING,
    DORA,
    FULL,
    LORA,
    LORA_FA,
    MISS,
    MISSE,
    PISSA,
    RSLORA,
    SIGNED,
    VERA,
)
from common.runs import Estimate

FIGURES = Path(__file__).parent.parent.parent / "docs" / "figures"
# After Okabe and Ito, whose colours the common forms of colour blindness leave apart. Markers and
# dashes differ too.
STYLES: dict[str, tuple[str, str, str]] = {
    MISSE: ("#D55E00", "o", "-"),
    ALTERNATING: ("#8B1A1A", "h", "-"),
    SIGNED: ("#D55E00", "o", ":"),
    MISS: ("#E69F00", "s", "-"),
    LORA: ("#0072B2", "^", "--"),
    RSLORA: ("#0072B2", "v", ":"),
    PISSA: ("#009E73", "D", "--"),
    DORA: ("#56B4E9", "P", "--"),
    LORA_FA: ("#CC79A7", "X", "-."),
    ADALORA: ("#7F7F7F", "<", "-."),
    VERA: ("#B8A600", ">", ":"),
    FULL: ("#000000", "*", "-"),
}
SETTINGS = {
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.titlesize": 9,
    "grid.alpha": 0.3,
    "font.size": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "svg.hashsalt": "miss",
}


def panels(
    rows: int, columns: int, *, width: float = 3.6, height: float = 2.8, **kwargs: Any
) -> tuple[Any, list[Any]]:
    """A figure and its axes, in reading order."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("svg")
    pyplot.rcParams.update(SETTINGS)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, **kwargs
    )
    return figure, list(axes.flat)


def look(method: str, **others: Any) -> dict[str, Any]:
    """Keyword arguments of `plot` and `errorbar` for a method."""
    colour, marker, dash = STYLES[method]
    return {"color": colour, "marker": marker, "linestyle": dash, "label": method} | others


def band(
    axis: Any, x: Sequence[float], values: Sequence[Sequence[float]], method: str, **others: Any
) -> None:
    """A line through the means with its 95 % interval as a band.

    ``values`` holds at each x one number a seed.
    """
    estimates = [Estimate.of(of_x) for of_x in values]
    means = [estimate.mean for estimate in estimates]
    axis.plot(x, means, **look(method, markevery=max(1, len(x) // 8), **others))
    low, high = ([mean + sign * half for mean, half in estimates] for sign in (-1, 1))
    if len(values[0]) > 1:
        axis.fill_between(x, low, high, color=STYLES[method][0], alpha=0.1, linewidth=0)


def save(figure: Any, name: str, sources: Iterable[Path]) -> None:
    """Write ``docs/figures/<name>.svg``, which carries a digest of the result files it shows."""
    from matplotlib import pyplot

    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None, "Description": digest(sources)})
    pyplot.close(figure)


def digest(sources: Iterable[Path]) -> str:
    """The names and SHA-256 sums of result files."""
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
    return "; ".join(f"{name} {of_file[:16]}" for name, of_file in sums.items())
