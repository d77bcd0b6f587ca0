"""Figures 1 to 3 of arXiv 2303.11803 from our runs, and what the paper does not show."""

from pathlib import Path
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.methods import BASELINE
from experiments.reporting import data_size
from experiments.reporting.drawing import (
    COLORS,
    MARKERS,
    PERCENT,
    drawn_half_width,
    legend,
    marker,
    panels,
    save,
    short,
)
from experiments.reporting.runs import Study, defaults, method_of

PAPER = Path(__file__).with_name("paper_figure2.csv")
_PLACE = 0.5  # points of noise between methods
_LEAST = -25  # points of gain: what is below stands there, and does not squeeze the others
_PAPER_COLUMNS = {
    "quant": "gain_quantization",
    "dropout": "gain_dropout",
    "prune": "gain_pruning",
    "early_stopping": "gain_early_stopping",
    "weight_decay": "gain_weight_decay",
}


def draw_all(studies: list[tuple[str, Study, pl.DataFrame]], folder: Path) -> list[Path]:
    """Draws what the runs are enough for, and gives the files."""
    drawn = []
    for number, (title, study, summary) in enumerate(studies, 1):
        suffix = f"-{number}" if len(studies) > 1 else ""
        figures = {
            "figure1": curves(study),
            "figure2": accuracy_and_gain(study, summary),
            "figure3": settings(study, summary),
            "memorisation": memorisation(summary),
        }
        for name, figure in figures.items():
            if figure is not None:
                figure.suptitle(f"{short(title)}\n{about(study)}", fontsize="medium")
                drawn.append(save(figure, folder / f"{name}{suffix}.png"))
    if (figure := gain_against_memorisation(studies)) is not None:
        drawn.append(save(figure, folder / "gain-against-memorisation.png"))
    return drawn + data_size.draw([study for _, study, _ in studies], folder)


def about(study: Study) -> str:
    """What was trained, on how much, and how often."""
    setup, seeds = study.setup, len(study.seeds)
    images = f"{setup['train_size']:,} images" if setup.get("train_size") else "all images"
    repeated = "1 seed" if seeds == 1 else f"up to {seeds} seeds"
    return f"{setup.get('model', 'resnet20')}, {images}, {setup['epochs']} epochs, {repeated}"


def curves(study: Study) -> Figure | None:
    """Figure 1: training and test loss over the epochs, float against quantized, for the noise and
    seed with the most evaluations."""
    pair = {defaults()[name]: name for name in ("baseline", "quant")}
    runs = [run for run in study.runs if run.label in pair and run.epochs]
    points: dict[tuple, list] = {}
    for run in runs:
        points.setdefault((run.noise, run.seeds), []).append(run)
    complete = [group for group in points.values() if len(group) == len(pair)]
    if not complete:
        return None

    def evaluations(group: list) -> tuple[int, float]:
        count = min(sum(e["test_loss"] is not None for e in run.epochs) for run in group)
        return count, group[0].noise

    group = max(complete, key=evaluations)
    shown = {
        "loss": "training loss",
        "test_loss": "test loss",
        "train_accuracy_flipped": "wrong training labels fitted, %",
        "test_accuracy": "test accuracy, %",
    }
    figure, (axes,) = panels(len(shown))
    for axis, (metric, title) in zip(axes, shown.items(), strict=True):
        unit = PERCENT if title.endswith("%") else 1
        for run in sorted(group, key=lambda run: run.label):
            known = [(e["epoch"], unit * e[metric]) for e in run.epochs if e[metric] is not None]
            if known:
                values = zip(*known, strict=True)
                axis.plot(*values, color=COLORS[pair[run.label]], label=run.label)
        axis.set(title=title, xlabel=f"epoch (noise {group[0].noise:g})")
    legend(figure, axes[0])
    return figure


def accuracy_and_gain(study: Study, summary: pl.DataFrame) -> Figure | None:
    """Figure 2: test accuracy and gain over noise, the published curves dashed where noise and data
    are theirs.

    Bars are standard deviations of the accuracy, and confidence intervals of the gain; the latter
    from 3 seeds on, because those of 2 would fill the figure.
    """
    if summary["noise"].n_unique() < 2:
        return None
    paper = pl.read_csv(PAPER, comment_prefix="#")
    figure, ((left, right),) = panels(2, width=5.5)
    is_theirs = study.setup["dataset"] == "cifar10" and study.setup["noise_kind"] == "symmetric"
    shown = _defaults(summary)
    for number, (name, label, rows) in enumerate(shown):
        beside = number - (len(shown) - 1) / 2
        _line(left, rows, "test_accuracy_mean", "test_accuracy_std", name, label, beside)
        if name != "baseline":
            rows = rows.with_columns(drawn_half_width())
            _line(right, rows, "gain", "gain_half_width", name, label, beside)
        if is_theirs and name in _PAPER_COLUMNS:
            gain = paper[_PAPER_COLUMNS[name]]
            right.plot(paper["noise_percent"], gain, "--", color=COLORS[name], alpha=0.5)
    if is_theirs:
        left.plot(
            paper["noise_percent"],
            paper["baseline_accuracy"],
            "--",
            color=COLORS["baseline"],
            alpha=0.5,
            label="published (dashed): full CIFAR-10, 200 epochs",
        )
    noise = "labels re-drawn, %" if study.setup["noise_kind"] == "symmetric" else "noise, %"
    left.set(title="test accuracy, %; bars: standard deviation", xlabel=noise)
    right.set(title="gain over the baseline, points; bars: 95 % interval", xlabel=noise)
    right.axhline(0, color="black", linewidth=0.8)
    legend(figure, left)
    return figure


def settings(study: Study, summary: pl.DataFrame) -> Figure | None:
    """Figure 3: the gain of each setting of quantization, dropout and pruning."""
    families = {
        name: sorted(label for label in study.labels if _is_setting_of(label, name))
        for name in ("quant", "dropout", "prune")
    }
    families = {name: labels for name, labels in families.items() if len(labels) > 1}
    if not families or summary["gain"].is_null().all():
        return None
    figure, (axes,) = panels(len(families))
    noises = summary["noise"].unique()
    for axis, (name, labels) in zip(axes, families.items(), strict=True):
        for row, label in enumerate(labels):
            known = summary.filter(pl.col("gain").is_not_null(), label=label)
            for gain, noise in zip(PERCENT * known["gain"], known["noise"], strict=True):
                points = axis.scatter(
                    [max(gain, _LEAST)],
                    [row],
                    c=[noise],
                    marker="<" if gain < _LEAST else "o",
                    vmin=0,
                    vmax=1,
                    cmap="viridis",
                )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(labels)), labels)
        at = f", noise {noises[0]:g}" if len(noises) == 1 else ""
        axis.set(title=f"{name}{at}", xlabel="gain over the baseline, points")
    least: Any = summary["gain"].min()
    largest: Any = summary["gain"].max()
    low = max(PERCENT * least, _LEAST)
    if low == _LEAST:
        axes[0].set_xlabel(f"gain over the baseline, points (arrows: below {_LEAST})")
    for axis in axes:
        axis.set_xlim(low - 2, PERCENT * largest + 2)
    if len(noises) > 1:
        figure.colorbar(points, ax=axes, label="share of labels re-drawn")
    return figure


def memorisation(summary: pl.DataFrame) -> Figure | None:
    """How many of the wrong, and of the right, training labels each method fits."""
    if summary["noise"].n_unique() < 2:
        return None
    figure, (axes,) = panels(2, width=5.5)
    shown = {
        "train_accuracy_flipped": "wrong training labels fitted, %",
        "train_accuracy_clean": "right training labels fitted, %",
    }
    for axis, (measure, title) in zip(axes, shown.items(), strict=True):
        known = [found for found in _defaults(summary) if f"{measure}_mean" in found[2].columns]
        for number, (name, label, rows) in enumerate(known):
            beside = number - (len(known) - 1) / 2
            _line(axis, rows, f"{measure}_mean", f"{measure}_std", name, label, beside)
        axis.set(title=f"{title}; bars: standard deviation", xlabel="noise, %")
    legend(figure, axes[1])
    return figure


def gain_against_memorisation(
    studies: list[tuple[str, Study, pl.DataFrame]],
) -> Figure | None:
    """What each method gains, by how many wrong labels the baseline fits: its share of the wrong
    ones times their share of all. A colour a method, a marker a study; a line over the noise."""
    figure, ((axis,),) = panels(1, width=7)
    for number, (title, _, summary) in enumerate(studies):
        memorised = _memorised_by_baseline(summary)
        shown = False
        for name, label, rows in _defaults(summary):
            points = [
                (PERCENT * memorised[row["noise"]], PERCENT * row["gain"])
                for row in rows.iter_rows(named=True)
                if row["gain"] is not None and row["noise"] in memorised
            ]
            if name != "baseline" and points:
                shown = True
                known = axis.get_legend_handles_labels()[1]
                axis.plot(
                    *zip(*sorted(points), strict=True),
                    marker=marker(number),
                    linewidth=1,
                    color=COLORS[name],
                    label=None if label in known else label,
                )
        if shown and len(studies) > 1:
            axis.scatter([], [], marker=marker(number), color="black", label=short(title))
    if not axis.lines:
        return None
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(
        title="what protection is worth, by how much there is to protect against",
        xlabel="training images whose wrong label the baseline fits, % of all",
        ylabel="gain over the baseline, points",
    )
    legend(figure, axis)
    return figure


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


def _defaults(summary: pl.DataFrame) -> list[tuple[str, str, pl.DataFrame]]:
    """The methods at their defaults: name, label and rows."""
    found = []
    for name, label in defaults().items():
        rows = summary.filter(label=label).sort("noise")
        if len(rows):
            found.append((name, label, rows))
    return found


def _line(
    axis: Axes, rows: pl.DataFrame, mean: str, spread: str, name: str, label: str, beside: float
) -> None:
    """``beside``: by how many places it is moved aside, so that bars do not hide each other."""
    rows = rows.filter(pl.col(mean).is_not_null())
    axis.errorbar(
        PERCENT * rows["noise"] + _PLACE * beside,
        PERCENT * rows[mean],
        yerr=PERCENT * rows[spread].fill_null(float("nan")),
        color=COLORS[name],
        marker=MARKERS[name],
        markersize=4,
        capsize=2,
        linewidth=1.2,
        label=label,
    )


def _is_setting_of(label: str, name: str) -> bool:
    return "+" not in label and method_of(label) == name
