"""Means over folds, then over seeds, and differences to the baseline."""

import polars as pl

from experiments.reporting import comparison
from experiments.reporting.action_units.runs import SCORES, ActionUnitStudy, of_au

_SEED = ["label", "noise", "seed", "noise_seed"]
_POINT = ["label", "noise"]


def summary(study: ActionUnitStudy) -> pl.DataFrame:
    """One row for each label and noise, from the seeds with all folds.

    The `means` and the `gains`, over seeds, of the means over folds of all that was measured; of
    each average F1 also `NAME_over_aus`, the standard deviation (with n - 1) of the AUs' means,
    and `NAME_won`: in how many of the `fold_pairs` (the same fold and seeds) it is above the
    baseline's.
    """
    runs = complete(study)
    names = comparison.numbers(runs, study)
    scores = [name for name in SCORES if name in names]
    seeds = runs.group_by(_SEED, maintain_order=True).agg(pl.col(names).mean())
    parts = [
        comparison.gains(seeds, [name for name in names if name.startswith(SCORES)]),
        _won(runs, scores),
    ]
    table = comparison.means(seeds, names).with_columns(
        pl.concat_list(f"{of_au(score, au)}_mean" for au in study.aus)
        .list.std()
        .alias(f"{score}_over_aus")
        for score in scores
    )
    for part in parts:
        table = table.join(part, on=_POINT, how="left", nulls_equal=True)
    return comparison.in_order(table, study, *_POINT)


def complete(study: ActionUnitStudy) -> pl.DataFrame:
    """One row a run, as in `by_run`, of the seeds that have every fold of the study."""
    return comparison.by_run(study).filter(pl.len().over(_SEED) == len(study.folds))


def _won(runs: pl.DataFrame, scores: list[str]) -> pl.DataFrame:
    pairs = comparison.differences(runs, scores, ["noise", "seed", "noise_seed", "fold"])
    won = [(pl.col(score) > 0).sum().alias(f"{score}_won") for score in scores]
    return pairs.group_by(_POINT, maintain_order=True).agg(pl.len().alias("fold_pairs"), *won)
