"""Figures 1 and 2 of arXiv 2303.11803 from our runs, and what the paper does not show."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.methods import BASELINE
from experiments.reporting import data_size
from experiments.reporting.drawing import (
    BARS,
    PERCENT,
    Drawn,
    Style,
    color,
    drawn_half_width,
    half_width_of_mean,
    handle,
    legend,
    line,
    panels,
    percent,
    short,
    styles,
)
from experiments.reporting.finished_run import FinishedRun
from experiments.reporting.runs import Study, defaults, method_of, name_seeds
from experiments.reporting.settings import settings
from experiments.terminal import amount

PAPER = Path(__file__).with_name("paper_figure2.csv")
_PAPER_COLUMNS = {
    "quant": "gain_quantization",
    "dropout": "gain_dropout",
    "prune": "gain_pruning",
    "early_stopping": "gain_early_stopping",
    "weight_decay": "gain_weight_decay",
}
_CURVES = {
    "loss": "training loss, nats",
    "test_loss": "test loss, nats",
    "train_accuracy_flipped": "wrong training labels fitted, %",
    "test_accuracy": "test accuracy, %",
}
_FITTED = {
    "train_accuracy_flipped": "wrong training labels fitted, %",
    "train_accuracy_clean": "right training labels fitted, %",
}
_TITLES = _FITTED | {"test_accuracy": "test accuracy, %", "gain": "gain of test accuracy, points"}
_FILLS = ("full", "none", "left", "right", "top", "bottom")
_FEWEST = 3  # places along an axis: fewer are columns of points
Studies = list[tuple[str, Study, pl.DataFrame]]
"""The title, the runs and their summary of each."""


def draw_all(studies: Studies, folder: Path) -> Drawn:
    """Draws what the runs are enough for."""
    drawn = Drawn(folder)
    for number, (title, study, summary) in enumerate(studies, 1):
        suffix = f"-{number}" if len(studies) > 1 else ""
        figures = {
            "figure1": curves(study),
            "figure2": accuracy_and_gain(study, summary),
            "figure3": settings(summary),
            "memorisation": memorisation(study, summary),
        }
        for name, figure in figures.items():
            if isinstance(figure, Figure):
                figure.suptitle(f"{short(title)}\n{about(study)}", fontsize="medium")
            drawn.add(f"{name}{suffix}", figure)
        if isinstance(figures["figure2"], Figure) and not _gains(summary):
            why = "no run has the noise and seed of a baseline run"
            drawn.missing.append(f"gains in figure2{suffix}: {why}")
    drawn.add("gain-against-memorisation", gain_against_memorisation(studies))
    data_size.draw([study for _, study, _ in studies], drawn)
    return drawn


def about(study: Study) -> str:
    """What was trained, on how much, and how often."""
    setup = study.setup
    images = f"{setup['train_size']:,} images" if setup.get("train_size") else "all images"
    if setup.get("validation"):
        images += f", {PERCENT * setup['validation']:g} % of them held out"
    return f"{setup.get('model', 'resnet20')}, {images}, {amount(setup['epochs'], 'epoch')}"


def curves(study: Study) -> Figure | str:
    """Figure 1: losses and accuracies over the epochs, float against quantized, for the noise and
    seed with the most evaluations."""
    labels = [defaults()[name] for name in (BASELINE, "quant")]
    pairs: dict[tuple, list[FinishedRun]] = {}
    for run in study.runs:
        if run.label in labels and len(run.epochs) > 1:
            pairs.setdefault((run.noise, run.seeds), []).append(run)
    complete = [pair for pair in pairs.values() if len(pair) == len(labels)]
    if not complete:
        return f"needs {' and '.join(labels)} of the same noise and seed, of two epochs or more"

    def evaluations(pair: list[FinishedRun]) -> tuple[int, float]:
        count = min(sum(e["test_loss"] is not None for e in run.epochs) for run in pair)
        return count, percent(pair[0].noise)

    most: list[FinishedRun] = max(complete, key=evaluations)
    pair = sorted(most, key=lambda run: labels.index(run.label))
    shown = {key: text for key, text in _CURVES.items() if all(_curve(run, key) for run in pair)}
    figure, (axes,) = panels(len(shown))
    at = f"epoch ({percent(pair[0].noise):g} % noise, {name_seeds(*pair[0].seeds)})"
    for axis, (metric, text) in zip(axes, shown.items(), strict=True):
        unit = PERCENT if text.endswith("%") else 1
        for run in pair:
            epochs, values = zip(*_curve(run, metric), strict=True)
            is_sparse = len(epochs) < len(run.epochs)
            axis.plot(
                epochs,
                unit * np.array(values),
                color=color(run.label),
                marker=styles(labels)[run.label].marker if is_sparse else None,
            )
        axis.set(xlabel=at, ylabel=text)
        if metric == "train_accuracy_flipped":
            # From 0, as a small share is to look like one.
            axis.set_ylim(0, min(1.05 * axis.get_ylim()[1], PERCENT + 5))
    legend(figure, [Line2D([], [], color=color(r.label), label=f"{r.label} (n = 1)") for r in pair])
    return figure


def _curve(run: FinishedRun, metric: str) -> list[tuple[float, float]]:
    """Epochs and values; none where there is but one."""
    values = [(e["epoch"], e[metric]) for e in run.epochs]
    known = [(epoch, v) for epoch, v in values if epoch is not None and v is not None]
    return known if len(known) > 1 else []


def accuracy_and_gain(study: Study, summary: pl.DataFrame) -> Figure | str:
    """Figure 2: test accuracy and gain over noise, the published gains dashed where noise and data
    are theirs."""
    if len(study.noises) < 2:
        return _one_level(study)
    shown = _drawn(study)
    figure, (axes,) = panels(2 if _gains(summary) else 1, width=5.5, sharex=True)
    notes = _over_noise(axes[0], study, summary, shown, "test_accuracy")
    handles = _handles(summary, shown)
    for axis in axes[1:]:
        compared = {label: style for label, style in shown.items() if label != BASELINE}
        notes |= _over_noise(axis, study, summary, compared, "gain")
        axis.axhline(0, color="black", linewidth=0.8)
        if study.setup["dataset"] == "cifar10" and study.setup.get("noise_kind") == "symmetric":
            handles += _published(axis, compared, percent(study.noises[-1]))
    legend(figure, handles, sorted(notes))
    return figure


def _published(axis: Axes, shown: dict[str, Style], most: float) -> list[Line2D]:
    """The paper's gains, up to as much noise as ours; what the legend says of them."""
    paper = pl.read_csv(PAPER, comment_prefix="#").filter(pl.col("noise_percent") <= most)
    look: dict[str, Any] = {"linestyle": "--", "alpha": 0.5}
    of_ours = {defaults()[name]: column for name, column in _PAPER_COLUMNS.items()}
    of_ours = {label: column for label, column in of_ours.items() if label in shown}
    for label, column in of_ours.items():
        axis.plot(paper["noise_percent"], paper[column], color=color(label), **look)
    text = "dashed: published, all of CIFAR-10, 200 epochs"
    return [Line2D([], [], color="black", **look, label=text)] if of_ours else []


def memorisation(study: Study, summary: pl.DataFrame) -> Figure | str:
    """How many of the wrong, and of the right, training labels each method fits."""
    if len(study.noises) < 2:
        return _one_level(study)
    levels = {
        measure: summary.filter(pl.col(f"{measure}_mean").is_not_null())["noise"].n_unique()
        for measure in _FITTED
        if f"{measure}_mean" in summary.columns
    }
    if levels.get("train_accuracy_flipped", 0) < 2:
        return "needs wrong labels at two levels of noise or more"
    shown = _drawn(study)
    figure, (axes,) = panels(len(levels), width=5.5, sharex=True)
    notes = set()
    for axis, measure in zip(axes, levels, strict=True):
        notes |= _over_noise(axis, study, summary, shown, measure)
        axis.set_ylim(-3, PERCENT + 3)  # an interval can leave what is possible
    legend(figure, _handles(summary, shown), sorted(notes))
    return figure


def gain_against_memorisation(studies: Studies) -> Figure | str:
    """What each method gains, by how many wrong labels the baseline fits: its share of the wrong
    ones times their share of all. A filling of markers for each study."""
    points: dict[str, list[tuple[int, list[tuple[float, float]]]]] = {}
    counts: dict[str, list[int]] = {}
    for number, (_, study, summary) in enumerate(studies):
        memorised = _memorised_by_baseline(summary)
        for label in _drawn(study):
            rows = summary.filter(
                pl.col("gain").is_not_null(), pl.col("noise").is_in(list(memorised)), label=label
            ).sort("noise")
            if label != BASELINE and len(rows):
                pairs = zip(rows["noise"].replace_strict(memorised), rows["gain"], strict=True)
                found = [(PERCENT * x, PERCENT * y) for x, y in pairs]
                points.setdefault(label, []).append((number, sorted(found)))
                counts.setdefault(label, []).extend(rows["pairs"])
    # In whole percent: what is nearer than that stands above each other.
    places = {
        label: len({round(x) for _, found in series for x, _ in found})
        for label, series in points.items()
    }
    if max(places.values(), default=0) < _FEWEST:
        return f"no method has gains at {_FEWEST} shares of memorised images or more"
    shown = styles(label for label, count in places.items() if count > 1)
    figure, ((axis,),) = panels(1, width=7)
    for label, style in shown.items():
        for number, found in points[label]:
            axis.plot(
                *zip(*found, strict=True), **style._asdict(), **_of_study(number), linewidth=1
            )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(
        xlabel="training images whose wrong label the baseline fits, % of all",
        ylabel="gain of test accuracy over the baseline, points",
    )
    legend(figure, [handle(label, counts[label], style) for label, style in shown.items()])
    filled = sorted({number for label in shown for number, _ in points[label]})
    look: dict[str, Any] = {"color": "black", "marker": "o", "linestyle": ""}
    handles = []
    for number in filled:
        title, study, _ = studies[number]
        text = f"{short(title)}: {about(study)}"
        handles.append(Line2D([], [], **look, **_of_study(number), label=text))
    legend(figure, handles, place="outside upper center")
    return figure


def _of_study(number: int) -> dict[str, Any]:
    """How its markers look: filled in some way, and larger when all ways are used."""
    rounds, fill = divmod(number, len(_FILLS))
    return {"fillstyle": _FILLS[fill], "markersize": 6 + 3 * rounds}


def _memorised_by_baseline(summary: pl.DataFrame) -> dict[float, float]:
    """The share of all training images, by noise; 0 where nothing is wrong."""
    fitted = "train_accuracy_flipped_mean"
    if fitted not in summary.columns:
        return {}
    baseline = summary.filter(label=BASELINE)
    return {
        row["noise"]: (row[fitted] or 0.0) * row["wrong_labels_mean"]
        for row in baseline.iter_rows(named=True)
    }


def _one_level(study: Study) -> str:
    return f"all runs have the same noise, {percent(study.noises[0]):g} %"


def _gains(summary: pl.DataFrame) -> bool:
    compared = summary.filter(pl.col("label") != BASELINE)
    return compared["gain"].count() > 0


def _drawn(study: Study) -> dict[str, Style]:
    """The methods at their defaults, and all combinations. A method without a run at its defaults
    is there with every setting."""
    known, labels = defaults(), study.labels

    def is_drawn(label: str) -> bool:
        default = known.get(method_of(label) or "")
        return "+" in label or default is None or label == default or default not in labels

    return styles(filter(is_drawn, labels))


def _handles(summary: pl.DataFrame, shown: dict[str, Style]) -> list[Line2D]:
    return [
        handle(label, summary.filter(label=label)["seeds"], style) for label, style in shown.items()
    ]


def _over_noise(
    axis: Axes, study: Study, summary: pl.DataFrame, shown: dict[str, Style], measure: str
) -> set[str]:
    """A line for each method, moved a little aside where bars would hide each other. What is to be
    said of it."""
    is_gain = measure == "gain"
    value = "gain" if is_gain else f"{measure}_mean"
    half_width = drawn_half_width() if is_gain else half_width_of_mean(measure)
    rows = summary.with_columns(half_width.alias("half_width")).filter(
        pl.col(value).is_not_null(), pl.col("label").is_in(list(shown))
    )
    noises = PERCENT * np.array(study.noises)
    has_bars = rows["half_width"].is_not_nan().any()
    apart = has_bars * min(0.5, 0.2 * np.diff(noises).min() / len(shown))
    for place, (label, style) in enumerate(shown.items()):
        of_label = rows.filter(label=label).sort("noise")
        x, y, half_widths = (
            PERCENT * of_label[name].to_numpy() for name in ("noise", value, "half_width")
        )
        line(axis, x + apart * (place - (len(shown) - 1) / 2), y, half_widths, style)
    kind = study.setup.get("noise_kind")
    noise = "training labels re-drawn" if kind == "symmetric" else f"label noise ({kind})"
    axis.set(xlabel=f"{noise}, %", ylabel=_TITLES[measure])
    return {BARS} if has_bars else set()
