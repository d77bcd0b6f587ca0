"""What all figures have in common."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.methods import BASELINE, METHODS
from experiments.reporting.comparison import quantile
from experiments.reporting.runs import defaults, method_of
from experiments.storage.files import atomic

PERCENT = 100
BARS = "bars: 95 % t interval, n ≥ 3"
_FEWEST = 3  # of runs that have an interval drawn: that of two would fill the figure
_UNKNOWN = "black"
_LONGEST = 200  # characters of a title
_LARGEST = 30_000  # pixels across a figure
_LEGEND_ROW = 0.19  # inches

# Of Okabe and Ito, which colour-blind readers tell apart; without yellow, which is faint on white.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = "osv^D*XP<>p"  # no common factor with the colours: 66 pairs
_LINES = (("-", (0, (8, 1, 1, 1))), ("-.", ":"))
"""Of one method, and of several together; dashed is what was published."""

_PUBLISHED = ("quant", "dropout", "prune", "weight_decay", "label_smoothing", "early_stopping")
_NAMES = (BASELINE, *_PUBLISHED, *(name for name in METHODS if name not in _PUBLISHED))
_PLACES = {name: place for place, name in enumerate(_NAMES)}
"""Those of the paper first, so that their colours stay."""


class Style(NamedTuple):
    """How a line is drawn."""

    color: str
    marker: str
    linestyle: str | tuple[int, tuple[int, ...]]


def color(label: str) -> str:
    """That of the first method in a label."""
    name = method_of(label)
    return _color(_PLACES[name]) if name in _PLACES else _UNKNOWN


def _color(place: int) -> str:
    return _COLORS[(place - 1) % len(_COLORS)] if place else "0.4"


def marker(place: int) -> str:
    """One for each of some noises, in turn."""
    return _MARKERS[place % len(_MARKERS)]


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style for each label, all different up to some hundred of them.

    A method at its defaults has the same in every figure. A combination has the colour of its first
    method beside quantization, and a line that is broken.
    """
    known = set(defaults().values())
    used: Counter[object] = Counter()  # pairs of colour and marker, also by whether combined
    found: dict[str, Style] = {}
    unknown = len(_NAMES)
    for label in sorted(labels, key=lambda label: label not in known):
        names = list(map(method_of, label.split("+")))
        name = next((name for name in names if name not in (BASELINE, "quant")), names[0])
        if name is None:
            place, unknown = unknown, unknown + 1
        else:
            place = _PLACES[name]
        pairs = [(_color(place), marker(place + turn)) for turn in range(len(_MARKERS))]
        pair = min(pairs, key=used.__getitem__)
        is_combined = len(names) > 1
        of_kind = _LINES[is_combined]
        found[label] = Style(*pair, of_kind[used[pair, is_combined] % len(of_kind)])
        used.update([pair, (pair, is_combined)])
    return found


def panels(
    columns: int,
    rows: int = 1,
    width: float = 4,
    height: float = 4.2,
    sharex: Literal["col"] | bool = False,
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, `[rows, columns]`; sizes in inches, of one panel."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, axes


def legend(
    figure: Figure,
    handles: Sequence[Line2D],
    notes: Sequence[str] = (),
    place: Literal["outside lower center", "outside upper center"] = "outside lower center",
) -> None:
    """Below or above the panels, which keep their size."""
    width, height = figure.get_size_inches()
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(max(int(width / (0.7 + 0.075 * longest)), 1), len(handles))
    rows = math.ceil(len(handles) / columns) + bool(notes)
    figure.set_size_inches(width, height + _LEGEND_ROW * rows)
    figure.legend(
        handles=handles,
        loc=place,
        ncols=columns,
        fontsize="small",
        title="; ".join(notes) or None,
        title_fontsize="small",
    )


def handle(label: str, counts: Iterable[int], style: Style) -> Line2D:
    """For the legend, with how many runs there are."""
    text = f"{short(label)} ({counted(counts)})"
    return Line2D([], [], **style._asdict(), markersize=5, linewidth=1.2, label=text)


def counted(counts: Iterable[int]) -> str:
    """How many runs there are in each of several places."""
    least, *_, most = sorted(counts) * 2
    return f"n = {least}" if least == most else f"n = {least} to {most}"


def line(axis: Axes, x: np.ndarray, y: np.ndarray, half_widths: np.ndarray, style: Style) -> None:
    """With intervals, but for those that are NaN."""
    known = ~np.isnan(half_widths)
    axis.plot(x, y, **style._asdict(), markersize=5, linewidth=1.2)
    if known.any():
        axis.errorbar(
            x[known],
            y[known],
            half_widths[known],
            fmt="none",
            ecolor=style.color,
            elinewidth=1.2,
            capsize=2,
        )


def percent(noise: float | None) -> float:
    """Of a run on classification, which always tells it."""
    assert noise is not None
    return PERCENT * noise


def short(title: str) -> str:
    """The beginning of a title that is too long for a figure."""
    return title if len(title) <= _LONGEST else title[: _LONGEST - 3] + "..."


def drawn_half_width(gain: str = "gain") -> pl.Expr:
    """Half of a gain's confidence interval where it is drawn, else NaN."""
    known = pl.when(pl.col("pairs") >= _FEWEST).then(pl.col(f"{gain}_half_width"))
    return known.fill_null(float("nan"))


def half_width_of_mean(measure: str) -> pl.Expr:
    """The same of a mean over seeds."""
    count = pl.col("seeds")
    factor = count.map_elements(
        lambda n: quantile(n - 1) / math.sqrt(n) if n >= _FEWEST else math.nan,
        return_dtype=pl.Float64,
    )
    return (pl.col(f"{measure}_std") * factor).fill_null(float("nan"))


class Drawn:
    """The figures of a report, each as PNG and as SVG, and why others are missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[Path] = []
        self.missing: list[str] = []

    def add(self, name: str, figure: Figure | str) -> None:
        """A figure, or why there is none."""
        if isinstance(figure, str):
            self.missing.append(f"{name}: {figure}")
        else:
            self.files += save(figure, self.folder / name)

    def section(self) -> str:
        """Markdown that shows them."""
        shown = [path.name for path in self.files if path.suffix == ".png"]
        parts = ["## Figures"]
        if shown:
            parts.append("Each is there as SVG too, under the same name.")
        parts += [f"![{name.removesuffix('.png')}]({name})" for name in shown]
        if self.missing:
            parts += ["Not drawn:", "\n".join(f"- {reason}" for reason in self.missing)]
        return "\n\n".join(parts)


def save(figure: Figure, path: Path) -> list[Path]:
    """As PNG and as SVG, whose suffixes are added to the path."""
    dpi = min(150, _LARGEST / max(figure.get_size_inches()))
    files = []
    # The same bytes for the same figure. Letters are outlines: they look, and fit, the same where
    # the font is missing.
    with matplotlib.rc_context({"svg.hashsalt": "noisyq_fast", "svg.fonttype": "path"}):
        for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
            file = path.with_name(f"{path.name}.{suffix}")
            with atomic(file) as temporary:
                figure.savefig(temporary, dpi=dpi, format=suffix, metadata=metadata)
            files.append(file)
    return files
