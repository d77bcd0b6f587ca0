"""Means over seeds, and differences to the baseline."""

from collections.abc import Sequence

import polars as pl
from scipy.stats import t as student_t

from experiments.methods import BASELINE
from experiments.reporting.escaping import one_line
from experiments.reporting.runs import Study

CONFIDENCE = 0.95
_POINT = ["label", "noise"]
_PAIR = ["noise", "seed", "noise_seed"]


def by_run(study: Study) -> pl.DataFrame:
    """One row a run: its coordinates, all that was measured, and where it comes from."""
    rows = [
        {**run.coordinates, **run.measured, "data": run.data, "folder": one_line(run.folder.name)}
        for run in study.runs
    ]
    table = pl.DataFrame(rows, infer_schema_length=None)
    return in_order(table, study, *study.runs[0].coordinates)


def summary(study: Study) -> pl.DataFrame:
    """One row for each label and noise.

    The `means` of all that was measured. `gain` is the gain of test accuracy over the baseline, as
    in `gains`, with its `pairs` and `gain_half_width`.
    """
    runs = by_run(study)
    gained = gains(runs, ["test_accuracy"]).rename(lambda name: name.removeprefix("test_accuracy_"))
    table = means(runs, numbers(runs, study)).join(gained, on=_POINT, how="left")
    return in_order(table, study, *_POINT)


def numbers(runs: pl.DataFrame, study: Study) -> list[str]:
    """What was measured in any of the runs."""
    return [name for name in study.runs[0].measured if runs[name].dtype.is_numeric()]


def in_order(table: pl.DataFrame, study: Study, *by: str) -> pl.DataFrame:
    """Sorted by columns, labels as in the study."""
    position = pl.col("label").cast(pl.Enum(study.labels))
    return table.sort(position if name == "label" else name for name in by)


def means(runs: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """One row for each label and noise: `NAME_mean` and `NAME_std` (over `seeds` seeds, with n - 1;
    null for one)."""
    return runs.group_by(_POINT, maintain_order=True).agg(
        pl.len().alias("seeds"),
        *(pl.col(name).mean().alias(f"{name}_mean") for name in names),
        *(pl.col(name).std().alias(f"{name}_std") for name in names),
    )


def gains(runs: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """One row for each label and noise.

    `NAME_gain` is the mean difference to the baseline with the same seeds, of which there are
    `pairs`; `NAME_gain_half_width` is half of its 95 % confidence interval, by Student's t, null
    for a single pair.
    """
    pairs = pl.col("pairs")
    # Of one pair the standard deviation is null, and so is all that comes of it.
    quantiles = pl.when(pairs > 1).then(pairs - 1).map_elements(quantile, return_dtype=pl.Float64)
    to_half_width = quantiles / pairs.sqrt()
    return (
        differences(runs, names, _PAIR)
        .group_by(_POINT, maintain_order=True)
        .agg(
            pl.len().alias("pairs"),
            *(pl.col(name).mean().alias(f"{name}_gain") for name in names),
            *(pl.col(name).std().alias(f"{name}_gain_half_width") for name in names),
        )
        .with_columns(pl.col(f"{name}_gain_half_width") * to_half_width for name in names)
    )


def differences(runs: pl.DataFrame, names: Sequence[str], pair: Sequence[str]) -> pl.DataFrame:
    """Label, noise, and by how much each run differs from the baseline's with the same `pair`, of
    those that have one."""
    baseline = runs.filter(label=BASELINE).select(*pair, *names)
    both = runs.join(
        baseline, on=pair, suffix="_of_baseline", nulls_equal=True, maintain_order="left"
    )
    return both.select(*_POINT, *(pl.col(name) - pl.col(f"{name}_of_baseline") for name in names))


def quantile(freedom: int) -> float:
    """By which a standard error is multiplied for half of a confidence interval: Student's t with
    so many degrees of freedom."""
    return float(student_t.ppf((1 + CONFIDENCE) / 2, freedom))
