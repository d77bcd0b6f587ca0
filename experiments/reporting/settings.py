"""Figure 3 of arXiv 2303.11803: the gain of each setting of a method."""

import math
import re

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.methods import BASELINE
from experiments.reporting.drawing import (
    BARS,
    PERCENT,
    Style,
    counted,
    drawn_half_width,
    legend,
    marker,
    panels,
)
from experiments.reporting.runs import method_of

_COLUMNS = 3
_REACH = 25  # points of gain below 0, or above the best: what is further would squeeze the others


def settings(summary: pl.DataFrame) -> Figure | str:
    """A panel for each method with several settings, a row for each of them, in the order of its
    numbers; a colour and marker for each noise. What leaves the panel is an arrow."""
    known = summary.filter(pl.col("gain").is_not_null(), pl.col("label") != BASELINE)
    families = _families(known.with_columns(drawn_half_width().alias("half_width")))
    if not families:
        return "no method has gains of several settings at one noise"
    shown = pl.concat(families.values())
    noises = sorted(shown["noise"].unique())
    styles = {
        noise: Style(colormaps["viridis"](0.85 * noise), marker(place), "")
        for place, noise in enumerate(noises)
    }
    columns = min(len(families), _COLUMNS)
    longest = max(rows["label"].n_unique() for rows in families.values())
    figure, axes = panels(
        columns,
        math.ceil(len(families) / columns),
        width=4.5 if columns > 1 else 6,
        height=1.2 + 0.3 * max(longest, 4),
        sharex=True,
    )
    gains, half_widths = (
        PERCENT * shown[name].fill_nan(0).to_numpy() for name in ("gain", "half_width")
    )
    low = min(max((gains - half_widths).min(), -_REACH), 0)
    high = max(min((gains + half_widths).max(), gains.max() + _REACH), 0)
    axes[0, 0].set_xlim(low - 3, high + 3)
    for axis, (name, rows) in zip(axes.flat, families.items(), strict=False):
        _draw(axis, rows, styles)
        axis.set_title(name, fontsize="medium")
        axis.set_xlabel("gain of test accuracy, points")
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(families) :]:
        axis.set_visible(False)
    handles = [
        Line2D(
            [],
            [],
            **style._asdict(),
            label=f"{PERCENT * noise:g} % noise ({counted(shown.filter(noise=noise)['pairs'])})",
        )
        for noise, style in styles.items()
    ]
    notes = [BARS] if shown["half_width"].is_not_nan().any() else []
    if gains.min() < -_REACH:
        notes.append(f"arrows: below {-_REACH} points")
    legend(figure, handles, notes)
    return figure


def _families(known: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """By method the gains of its settings, at every noise at which there are several."""
    names = {label: method_of(label) for label in known["label"].unique(maintain_order=True)}
    single = {label: name for label, name in names.items() if name and "+" not in label}
    families = {}
    for name in dict.fromkeys(single.values()):
        labels = [label for label in single if single[label] == name]
        rows = known.filter(pl.col("label").is_in(labels))
        rows = rows.filter(pl.col("label").n_unique().over("noise") > 1)
        if len(rows):
            families[name] = rows
    return families


def _draw(axis: Axes, rows: pl.DataFrame, styles: dict[float, Style]) -> None:
    labels = sorted(rows["label"].unique(), key=_by_numbers)
    places = {noise: place for place, noise in enumerate(sorted(rows["noise"].unique()))}
    for row in rows.iter_rows(named=True):
        gain, style = PERCENT * row["gain"], styles[row["noise"]]
        beside = 0.6 * ((places[row["noise"]] + 0.5) / len(places) - 0.5)
        is_beyond = gain < -_REACH
        axis.errorbar(
            max(gain, -_REACH),
            labels.index(row["label"]) + beside,
            xerr=None if is_beyond or np.isnan(row["half_width"]) else PERCENT * row["half_width"],
            color=style.color,
            marker="<" if is_beyond else style.marker,
            markersize=5,
            capsize=2,
        )
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)


def _by_numbers(label: str) -> list[str | float]:
    """Sorts by the numbers in a label rather than their digits."""
    parts = re.split(r"(\d+(?:\.\d+)?)", label)
    return [float(part) if place % 2 else part for place, part in enumerate(parts)]
