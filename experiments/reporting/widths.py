"""Networks that compute at several widths: what is reported of each width."""

import functools
from collections.abc import Callable

import polars as pl

from experiments.methods import BASELINE
from experiments.reporting import comparison, tables
from experiments.reporting.finished_run import FinishedRun
from experiments.reporting.runs import Study
from experiments.reporting.tables import Row, cell, gain_cell, markdown, mean_cell, mean_of
from noisyq_fast.widths import FLOAT

_POINT = ["label", "noise"]
_MEASURES = ("test_accuracy", "train_accuracy_flipped", "train_accuracy_clean")
_GAIN = f"gain over the baseline, points of test accuracy, {tables.INTERVAL}"
_COSTS = {name: tables.COSTS[name] for name in ("parameters", "kB", "million MACs")}
_KINDS = {"At each share of the channels": (0, 1), "At each number of bits": (2, FLOAT)}
"""A heading for the widths from one to another."""


def summary(study: Study) -> pl.DataFrame:
    """One row for each label, noise and width; none where no network has several.

    The `means` of what was measured at the width, and the gain of its test accuracy over the
    baseline: as in `comparison.summary`.
    """
    runs = _by_width(study)
    if runs.is_empty():
        return runs
    names = [name for name in FinishedRun.BY_WIDTH if runs[name].dtype.is_numeric()]
    baseline = comparison.by_run(study).filter(label=BASELINE)
    of_baseline = baseline.select(*study.runs[0].coordinates, "test_accuracy")
    parts = []
    for (width,), at_width in runs.group_by(["width"], maintain_order=True):
        compared = pl.concat([at_width, of_baseline], how="diagonal_relaxed")
        gained = comparison.gains(compared, ["test_accuracy"])
        gained = gained.rename(lambda name: name.removeprefix("test_accuracy_"))
        means = comparison.means(at_width, names)
        table = means.join(gained, on=_POINT, how="left", nulls_equal=True)
        parts.append(table.with_columns(pl.lit(width).alias("width")))
    table = pl.concat(parts).select("label", "noise", "width", pl.all().exclude(*_POINT, "width"))
    return comparison.in_order(table, study, *_POINT, "width")


def _by_width(study: Study) -> pl.DataFrame:
    """One row for each run and width."""
    rows = [
        {**run.coordinates, "width": width, **measured}
        for run in study.runs
        for width, measured in run.by_width.items()
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def sections(study: Study) -> list[str]:
    """The tables of a study: methods downwards, widths across."""
    table = summary(study)
    parts = []
    for heading, (least, most) in _KINDS.items():
        of_kind = table.filter(pl.col("width").is_between(least, most)) if len(table) else table
        if not of_kind.is_empty():
            parts += [f"### {heading}", *_tables(of_kind)]
    return parts


def _tables(table: pl.DataFrame) -> list[str]:
    titles = {measure: title for title, (measure, _) in tables.MEASURES.items()}
    cells = {
        titles[name]: functools.partial(mean_cell, measure=name)
        for name in _MEASURES
        if f"{name}_mean" in table.columns
    }
    return [*(_grid(table, *both) for both in (cells | {_GAIN: gain_cell}).items()), _costs(table)]


def _grid(table: pl.DataFrame, name: str, cell_of: Callable[[Row | None], str]) -> str:
    widths = sorted(table["width"].unique())
    rows = {(row["label"], row["noise"], row["width"]): row for row in table.iter_rows(named=True)}
    lines = dict.fromkeys((label, noise) for label, noise, _ in rows)
    return markdown(
        [name, "noise", *map(_title, widths)],
        [
            [label, f"{noise:g}", *(cell_of(rows.get((label, noise, width))) for width in widths)]
            for label, noise in lines
        ],
    )


def _costs(table: pl.DataFrame) -> str:
    widths = sorted(table["width"].unique())
    body = []
    for label in table["label"].unique(maintain_order=True):
        for title, (measure, factor, form) in _COSTS.items():
            if f"{measure}_mean" in table.columns:
                of_label = table.filter(label=label)
                means = [mean_of(of_label.filter(width=w)[f"{measure}_mean"]) for w in widths]
                body.append([label, title, *(cell(mean, form, factor) for mean in means)])
    return markdown(["cost", "", *map(_title, widths)], body)


def _title(width: float) -> str:
    if width <= 1:
        return f"width {width:g}"
    return "float" if width == FLOAT else f"{width:g} bits"
