"""Markdown."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from experiments.reporting.runs import Study

_Row = dict[str, Any]
_CELLS = {
    "test accuracy, %": ("test_accuracy", 100),
    "wrong training labels fitted, %": ("train_accuracy_flipped", 100),
    "right training labels fitted, %": ("train_accuracy_clean", 100),
    "calibration error, points": ("test_calibration_error", 100),
    "test loss": ("test_loss", 1),
    "test accuracy at the best epoch on held-out samples, %": (
        "test_accuracy_at_best_validation",
        100,
    ),
}


def study_section(title: str, study: Study, summary: pl.DataFrame) -> str:
    """All tables of a study, with what it is and what it lacks."""
    setup = ", ".join(f"{name} {value}" for name, value in study.setup.items())
    seeds = sorted({run.seeds[0] for run in study.runs})
    parts = [
        f"## {title}",
        f"{len(study.runs)} runs, seeds {', '.join(map(str, seeds))}: {setup}.",
        "Mean ± standard deviation over seeds (n of them where methods differ in it).",
    ]
    for name, (measure, factor) in _CELLS.items():
        if f"{measure}_mean" in summary.columns:
            cell = functools.partial(_mean, measure=measure, factor=factor)
            parts.append(_grid(name, study, summary, cell))
    parts.append(
        _grid(
            "gain over the baseline, points of test accuracy, ± half a 95 % confidence interval of "
            "the paired difference",
            study,
            summary,
            _gain,
        )
    )
    parts.append(_costs(study, summary))
    if missing := study.missing():
        parts.append("Missing, for every method to have every noise and seed:")
        parts.append("\n".join(f"- {line}" for line in missing))
    return "\n\n".join(parts)


def unfinished_section(folders: list[Path]) -> str:
    """The runs that are left out because they have not ended."""
    return "\n\n".join(["## Unfinished runs, left out", *(f"- {f.name}" for f in folders)])


def _grid(
    name: str, study: Study, summary: pl.DataFrame, cell: Callable[[_Row | None], str]
) -> str:
    rows = {(row["label"], row["noise"]): row for row in summary.iter_rows(named=True)}
    header = [name, *(f"noise {noise:g}" for noise in study.noises)]
    body = [
        [label, *(cell(rows.get((label, noise))) for noise in study.noises)]
        for label in study.labels
    ]
    return _markdown(header, body)


def _mean(row: _Row | None, measure: str, factor: float) -> str:
    if row is None or row[f"{measure}_mean"] is None:
        return "-"
    deviation = row[f"{measure}_std"]
    spread = "" if deviation is None else f" ± {factor * deviation:.2f}"
    return f"{factor * row[f'{measure}_mean']:.2f}{spread}{_count(row['seeds'])}"


def _gain(row: _Row | None) -> str:
    if row is None or row["gain"] is None:
        return "-"
    half = row["gain_half_width"]
    spread = "" if half is None else f" ± {100 * half:.1f}"
    return f"{100 * row['gain']:+.1f}{spread}{_count(row['pairs'])}"


def _count(seeds: int) -> str:
    return f" (n {seeds})" if seeds > 1 else ""


def _costs(study: Study, summary: pl.DataFrame) -> str:
    names = ("parameters", "size_in_bits", "macs", "epochs_trained")
    body = []
    for label in study.labels:
        means = summary.filter(pl.col("label").cast(pl.String) == label).select(
            pl.col(f"{name}_mean").mean() for name in names
        )
        parameters, bits, macs, epochs = means.row(0)
        body.append(
            [label, f"{parameters:,.0f}", f"{bits / 8e3:,.1f}", f"{macs / 1e6:.2f}", f"{epochs:g}"]
        )
    return _markdown(["cost", "parameters", "kB", "million MACs", "epochs trained"], body)


def _markdown(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
