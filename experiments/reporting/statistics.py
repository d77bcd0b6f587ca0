"""Means over seeds, and differences to the baseline."""

import polars as pl
from scipy.stats import t as student_t

from experiments.methods import BASELINE
from experiments.reporting.runs import Study

CONFIDENCE = 0.95
MEASURED = (
    "wrong_labels",
    "test_accuracy",
    "test_loss",
    "test_calibration_error",
    "test_accuracy_at_best_validation",
    "train_accuracy_clean",
    "train_accuracy_flipped",
    "flipped_predicted_true",
    "accuracy_gap",
    "loss_gap",
    "epochs_trained",
    "parameters",
    "size_in_bits",
    "macs",
)
_POINT = ["label", "noise"]


def by_run(study: Study) -> pl.DataFrame:
    """One row a run: its label, noise and seeds, and all that was measured."""
    rows = [
        {
            "label": run.label,
            "noise": float(run.noise),
            "seed": run.seeds[0],
            "noise_seed": run.seeds[1],
            **{name: run.result[name] for name in MEASURED},
            "folder": run.folder.name,
        }
        for run in study.runs
    ]
    order = pl.Enum(study.labels)
    table = pl.DataFrame(rows, infer_schema_length=None)
    return table.with_columns(pl.col("label").cast(order)).sort("label", "noise", "seed")


def summary(study: Study) -> pl.DataFrame:
    """One row for each label and noise.

    `NAME_mean` and `NAME_std` (over `seeds` seeds, with n - 1; null for one) of all that was
    measured. `gain` is the mean difference of test accuracy to the baseline with the same seeds, of
    which there are `pairs`; `gain_half_width` is half of its 95 % confidence interval, by Student's
    t, null for a single pair.
    """
    runs = by_run(study)
    numbers = [name for name in MEASURED if runs[name].dtype.is_numeric()]
    means = runs.group_by(_POINT).agg(
        pl.len().alias("seeds"),
        *(pl.col(name).mean().alias(f"{name}_mean") for name in numbers),
        *(pl.col(name).std().alias(f"{name}_std") for name in numbers),
    )
    return means.join(_gains(runs), on=_POINT, how="left").sort(_POINT)


def _gains(runs: pl.DataFrame) -> pl.DataFrame:
    pair = ["noise", "seed", "noise_seed"]
    baseline = runs.filter(pl.col("label").cast(pl.String) == BASELINE)
    pairs = runs.join(baseline.select(*pair, pl.col("test_accuracy").alias("of_baseline")), on=pair)
    gain = pl.col("test_accuracy") - pl.col("of_baseline")
    # Of one pair the standard deviation is null, and so is all that comes of it.
    return (
        pairs.group_by(_POINT)
        .agg(pl.len().alias("pairs"), gain.mean().alias("gain"), gain.std().alias("deviation"))
        .with_columns(
            (
                pl.col("deviation")
                / pl.col("pairs").sqrt()
                * pl.col("pairs").map_elements(_quantile, return_dtype=pl.Float64)
            ).alias("gain_half_width")
        )
        .drop("deviation")
    )


def _quantile(pairs: int) -> float | None:
    return float(student_t.ppf((1 + CONFIDENCE) / 2, pairs - 1)) if pairs > 1 else None
