"""The gains behind table 1."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.methods import BASELINE
from experiments.reporting.action_units.published import AS_PUBLISHED, Published
from experiments.reporting.action_units.runs import ActionUnitStudy, of_au
from experiments.reporting.drawing import (
    BARS,
    PERCENT,
    Drawn,
    color,
    counted,
    drawn_half_width,
    legend,
    panels,
    short,
)
from experiments.reporting.runs import defaults
from experiments.terminal import amount

_QUANT = defaults()["quant"]
_GAIN = f"{AS_PUBLISHED}_gain"
_PUBLISHED: dict[str, Any] = {
    "marker": "D",
    "markerfacecolor": "none",
    "color": "black",
    "linestyle": "",
}


def draw_all(studies: list[tuple[str, ActionUnitStudy, pl.DataFrame]], folder: Path) -> Drawn:
    """Draws what the runs are enough for."""
    drawn = Drawn(folder)
    for number, (title, study, summary) in enumerate(studies, 1):
        figure = gains(study, summary)
        if isinstance(figure, Figure):
            figure.suptitle(f"{short(title)}\n{about(study)}", fontsize="medium")
        drawn.add("table1" + (f"-{number}" if len(studies) > 1 else ""), figure)
    return drawn


def about(study: ActionUnitStudy) -> str:
    """What was trained, on how much, and how often; by what it is judged."""
    setup = study.setup
    frames = setup.get("frames_per_subject")
    pictures = f"{frames} frames of each subject" if frames else "all frames"
    folds = ", ".join(map(str, study.folds))
    epochs = amount(setup["epochs"], "epoch")
    trained = f"{setup['encoder']} encoder, {pictures}, folds {folds}, {epochs}"
    return f"{trained}\nF1 against the annotators, at probability 0.5"


def gains(study: ActionUnitStudy, summary: pl.DataFrame) -> Figure | str:
    """The gain over the baseline of each method on average and, of quantization, for each AU; a row
    of panels for each noise."""
    known = summary.filter(pl.col(_GAIN).is_not_null(), pl.col("label") != BASELINE)
    if known.is_empty():
        return "no run has the noise, seed and folds of a baseline run"
    paper = Published.of(study)
    labels = [label for label in study.labels if label in known["label"]]
    noises = [noise for noise in study.noises if (known["noise"].eq_missing(noise)).any()]
    by_au = known.filter(label=_QUANT)
    height = 1.8 + 0.35 * max(len(labels), 4)
    columns = 1 if by_au.is_empty() else 2
    figure, axes = panels(columns, len(noises), width=5.5, height=height, sharex="col")
    reach = 0 if by_au.is_empty() else _reach(by_au, study.aus, paper)
    for row, noise in zip(axes, noises, strict=True):
        at = f", noise {noise:g}" if study.noise_varies else ""
        rows = known.filter(pl.col("noise").eq_missing(noise))
        row[0].set_title(f"average over the AUs{at} ({counted(rows['pairs'])})", fontsize="medium")
        row[0].set_xlabel("gain of F1 over the baseline, points")
        _methods(row[0], rows, labels, paper)
        quantized = by_au.filter(pl.col("noise").eq_missing(noise))
        for axis in row[1:]:
            if quantized.is_empty():
                axis.set_visible(False)
                continue
            count = counted(quantized["pairs"])
            axis.set_title(f"{_QUANT} by AU{at} ({count})", fontsize="medium")
            axis.set(xlabel="action unit", ylabel="gain of F1, points")
            _aus(axis, quantized, study.aus, paper, reach)
        for axis in row:
            axis.tick_params(labelbottom=True)
    half_widths = known.select(drawn_half_width(_GAIN)).to_series()
    notes = [BARS] if half_widths.is_not_nan().any() else []
    if reach and (_ends(by_au, study.aus) > reach).any():
        notes.append("arrows: the interval goes on")
    handles = [Line2D([], [], color=color(_QUANT), marker="o", label="mean over seeds")]
    if paper:
        handles.append(Line2D([], [], **_PUBLISHED, label="published, on BP4D (n = 5)"))
    legend(figure, handles, notes)
    return figure


def _methods(axis: Axes, rows: pl.DataFrame, labels: list[str], paper: Published | None) -> None:
    for row in rows.with_columns(drawn_half_width(_GAIN)).iter_rows(named=True):
        half_width = row[f"{_GAIN}_half_width"]
        axis.errorbar(
            PERCENT * row[_GAIN],
            labels.index(row["label"]),
            xerr=None if np.isnan(half_width) else PERCENT * half_width,
            color=color(row["label"]),
            marker="o",
            capsize=3,
        )
    if paper:
        of_ours = [(paper.gain(label), y) for y, label in enumerate(labels) if label in paper.f1]
        if of_ours:
            axis.plot(*zip(*of_ours, strict=True), **_PUBLISHED)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)


def _of_aus(rows: pl.DataFrame, aus: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Gains and half of their intervals, `[noise, AU]`, in points."""
    names = [f"{of_au(AS_PUBLISHED, au)}_gain" for au in aus]
    half_widths = rows.select(drawn_half_width(name) for name in names)
    return PERCENT * rows.select(names).to_numpy(), PERCENT * half_widths.to_numpy()


def _reach(rows: pl.DataFrame, aus: list[int], paper: Published | None) -> float:
    """How far panels go up and down: as far as all gains and most of the intervals do."""
    gains, ends = abs(_of_aus(rows, aus)[0]), _ends(rows, aus)
    published = abs(_published(paper, aus)) if paper else np.array([])
    return 1.1 * max(min(ends.max(), 2 * np.median(ends)), gains.max(), *published, 1)


def _published(paper: Published, aus: list[int]) -> np.ndarray:
    """The gains of quantization, `[AU]`."""
    return np.array([paper.gain(_QUANT, au) for au in aus], dtype=float)


def _ends(rows: pl.DataFrame, aus: list[int]) -> np.ndarray:
    """How far from 0 the intervals go, `[noise, AU]`."""
    gains, half_widths = _of_aus(rows, aus)
    return abs(gains) + np.nan_to_num(half_widths)


def _aus(
    axis: Axes, rows: pl.DataFrame, aus: list[int], paper: Published | None, reach: float
) -> None:
    (gains,), (half_widths,) = _of_aus(rows, aus)
    places = np.arange(len(aus))
    axis.bar(places, gains, color=color(_QUANT), alpha=0.7)
    known = ~np.isnan(half_widths)
    if known.any():
        look: dict[str, Any] = {"fmt": "none", "ecolor": "black", "capsize": 3}
        axis.errorbar(places[known], gains[known], yerr=half_widths[known], **look)
    for sign, arrow in ((1, "^"), (-1, "v")):
        beyond = sign * gains + np.nan_to_num(half_widths) > reach
        if beyond.any():
            ends = np.full(beyond.sum(), 0.97 * sign * reach)
            axis.scatter(places[beyond], ends, marker=arrow, color="black", zorder=3)
    if paper:
        axis.plot(places, _published(paper, aus), **_PUBLISHED)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(places, map(str, aus))
    axis.set_ylim(-reach, reach)
