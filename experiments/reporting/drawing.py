"""What all figures have in common."""

import colorsys
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.methods import BASELINE, METHODS
from experiments.reporting.runs import method_of
from experiments.storage.files import atomic

PERCENT = 100
_UNKNOWN = "black"
_MARKERS = "osv^D*XP<>"
_LONGEST = 200  # characters of a title
_LARGEST = 30_000  # pixels across a figure


# Of Okabe and Ito, which colour-blind readers tell apart; without yellow, which is faint on white.
_FIRST = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


def _color(index: int) -> str | tuple[float, float, float]:
    """One for each of any number of methods: after the first ones hues that lie the golden ratio
    apart, which markers tell apart."""
    if index < len(_FIRST):
        return _FIRST[index]
    return colorsys.hsv_to_rgb(index * 0.618 % 1, 0.9, 0.6)


_PUBLISHED = ("quant", "dropout", "prune", "weight_decay", "label_smoothing", "early_stopping")
_NAMES = [*_PUBLISHED, *(name for name in METHODS if name not in _PUBLISHED)]
COLORS = {BASELINE: "0.4"} | {name: _color(index) for index, name in enumerate(_NAMES)}
"""By the name of the method: those of the paper first, so that theirs stay."""


def color(label: str) -> str | tuple[float, float, float]:
    """That of the first method in a label."""
    return COLORS.get(method_of(label) or "", _UNKNOWN)


def marker(index: int) -> str | tuple[int, int, float]:
    """One for each of any number of methods or studies: after the named ones stars with ever more
    points."""
    return _MARKERS[index] if index < len(_MARKERS) else (index, 1, 0.0)


MARKERS = {name: marker(index) for index, name in enumerate(COLORS)}
"""By the name of the method."""


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


def short(title: str) -> str:
    """The beginning of a title that is too long for a figure."""
    return title if len(title) <= _LONGEST else title[: _LONGEST - 3] + "..."


def drawn_half_width(gain: str = "gain") -> pl.Expr:
    """Half of a gain's confidence interval from 3 seeds on; that of 2 would fill the figure. NaN,
    for no bar, where there is none."""
    known = pl.when(pl.col("pairs") > 2).then(pl.col(f"{gain}_half_width"))
    return known.fill_null(float("nan"))


def save(figure: Figure, path: Path) -> Path:
    """As PNG."""
    dpi = min(150, _LARGEST / max(figure.get_size_inches()))
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    return path
