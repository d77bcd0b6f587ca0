"""What all figures have in common."""

from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.files import atomic
from experiments.methods import BASELINE, METHODS

PERCENT = 100
COLORS = dict(
    zip([BASELINE, *METHODS], [f"C{index}" for index in (7, 0, 1, 2, 3, 4, 5)], strict=True)
)
"""By the name of the method."""


def color(label: str) -> str:
    """That of the first method in a label."""
    names = {name.replace("_", "-"): name for name in COLORS}
    return next(COLORS[name] for start, name in names.items() if label.startswith(start))


def panels(
    columns: int, rows: int = 1, width: float = 4, height: float = 4.2
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, `[rows, columns]`; sizes in inches, of one panel."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, axes


def legend(figure: Figure, axis: Axes) -> None:
    """Below the panels, what is in one of them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")


def drawn_half_width(gain: str = "gain") -> pl.Expr:
    """Half of a gain's confidence interval from 3 seeds on; that of 2 would fill the figure."""
    return pl.when(pl.col("pairs") > 2).then(pl.col(f"{gain}_half_width")).fill_null(0.0)


def save(figure: Figure, path: Path) -> Path:
    """As PNG."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return path
