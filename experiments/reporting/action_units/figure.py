"""The gains behind table 1."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.methods import BASELINE
from experiments.reporting.action_units.published import AS_PUBLISHED, Published
from experiments.reporting.action_units.runs import ActionUnitStudy, of_au
from experiments.reporting.drawing import (
    COLORS,
    PERCENT,
    color,
    drawn_half_width,
    legend,
    panels,
    save,
    short,
)
from experiments.reporting.runs import defaults

_QUANT = defaults()["quant"]


def draw_all(studies: list[tuple[str, ActionUnitStudy, pl.DataFrame]], folder: Path) -> list[Path]:
    """Draws what the runs are enough for, and gives the files."""
    drawn = []
    for number, (title, study, summary) in enumerate(studies, 1):
        if (figure := gains(study, summary)) is not None:
            suffix = f"-{number}" if len(studies) > 1 else ""
            figure.suptitle(short(title), fontsize="medium")
            drawn.append(save(figure, folder / f"table1{suffix}.png"))
    return drawn


def gains(study: ActionUnitStudy, summary: pl.DataFrame) -> Figure | None:
    """The gain over the baseline of each method on average and, of quantization, for each AU; a row
    of panels for each noise. Bars are confidence intervals, from 3 seeds on."""
    known = summary.filter(
        pl.col(f"{AS_PUBLISHED}_gain").is_not_null(), pl.col("label") != BASELINE
    )
    if known.is_empty():
        return None
    paper = Published.of(study)
    labels = [label for label in study.labels if label in known["label"]]
    noises = [noise for noise in study.noises if (known["noise"].eq_missing(noise)).any()]
    figure, axes = panels(2, len(noises), width=5.5, height=1.4 + 0.35 * max(len(labels), 7))
    for (left, right), noise in zip(axes, noises, strict=True):
        rows = known.filter(pl.col("noise").eq_missing(noise))
        at = f", noise {noise:g}" if study.noise_varies else ""
        _methods(left, rows, labels, paper)
        left.set(title=f"gain of average F1, points{at}")
        _aus(right, rows.filter(label=_QUANT), study.aus, paper)
        right.set(title=f"gain of {_QUANT} by AU, points{at}", xlabel="AU")
    if paper:
        legend(figure, axes[0, 0])
    return figure


def _methods(axis: Axes, rows: pl.DataFrame, labels: list[str], paper: Published | None) -> None:
    gain = f"{AS_PUBLISHED}_gain"
    for row in rows.with_columns(drawn_half_width(gain)).iter_rows(named=True):
        axis.errorbar(
            PERCENT * row[gain],
            labels.index(row["label"]),
            xerr=PERCENT * row[f"{gain}_half_width"],
            color=color(row["label"]),
            marker="o",
            capsize=3,
        )
    if paper:
        published = [(paper.gain(label), y) for y, label in enumerate(labels) if label in paper.f1]
        _published(axis, published)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)


def _aus(axis: Axes, rows: pl.DataFrame, aus: list[int], paper: Published | None) -> None:
    names = [f"{of_au(AS_PUBLISHED, au)}_gain" for au in aus]
    rows = rows.with_columns(drawn_half_width(name) for name in names)
    for row in rows.iter_rows(named=True):
        gains = np.array([PERCENT * row[name] for name in names])
        half_widths = np.array([PERCENT * row[f"{name}_half_width"] for name in names])
        axis.bar(
            range(len(aus)),
            gains,
            yerr=half_widths,
            color=COLORS["quant"],
            alpha=0.7,
            capsize=3,
        )
        ends = sorted(abs(gains) + np.nan_to_num(half_widths))
        if len(ends) > 1 and ends[-1] > 2 * ends[-2] > 0:  # One AU would squeeze the others.
            axis.set_ylim(-1.2 * ends[-2], 1.2 * ends[-2])
            axis.set_ylabel("points; an interval leaves the panel")
    if paper and len(rows):
        _published(axis, [(x, paper.gain(_QUANT, au)) for x, au in enumerate(aus)])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(aus)), map(str, aus))


def _published(axis: Axes, points: Sequence[tuple[float | None, float | None]]) -> None:
    if points:
        axis.scatter(
            *zip(*points, strict=True),
            marker="D",
            facecolors="none",
            edgecolors="black",
            zorder=3,
            label="published, on BP4D",
        )
