"""What a report says on the screen: the main score of each study, and why there is no gain."""

import polars as pl

from experiments.methods import BASELINE
from experiments.reporting.escaping import one_line
from experiments.reporting.report import Report
from experiments.reporting.runs import Study
from experiments.terminal import amount

_MOST_ROWS = 12
_MOST_NOISES = 8
_WIDEST_LABEL = 40


def overview(report: Report, studies: list[tuple[str, Study, pl.DataFrame]]) -> str:
    """Of each study a table, and why there is no gain."""
    parts = []
    for title, study, summary in studies:
        runs, seeds = amount(len(study.runs), "run"), amount(len(study.seeds), "seed")
        head = f"{one_line(title)}: {runs}, {seeds}"
        parts.append("\n".join([head, *_table(report, study, summary), *_no_gain(summary)]))
    return "\n\n".join(parts)


def _table(report: Report, study: Study, summary: pl.DataFrame) -> list[str]:
    """The mean over seeds of the main score: a line for each method, a column for each noise."""
    name, measure = report.score
    column = f"{measure}_mean"
    if column not in summary.columns:
        return [f"no {name}: no method has all folds for a seed"]
    noises = study.noises[:_MOST_NOISES]
    means = {(row["label"], row["noise"]): row[column] for row in summary.iter_rows(named=True)}
    labels = {label: one_line(label)[:_WIDEST_LABEL] for label in study.labels[:_MOST_ROWS]}
    width = max(map(len, [name, *labels.values()]))
    lines = [_line(name, width, ["" if n is None else f"noise {n:g}" for n in noises])]
    for label, shown in labels.items():
        values = [means.get((label, noise)) for noise in noises]
        lines.append(_line(shown, width, ["-" if v is None else f"{100 * v:.2f}" for v in values]))
    left = len(study.labels) - len(labels), len(study.noises) - len(noises)
    for count, what in zip(left, ("methods", "levels of noise"), strict=True):
        if count:
            lines.append(f"and {count} more {what} in report.md")
    return lines


def _line(head: str, width: int, cells: list[str]) -> str:
    return "  ".join([f"  {head:<{width}}", *(f"{cell:>10}" for cell in cells)]).rstrip()


def _no_gain(summary: pl.DataFrame) -> list[str]:
    """Why no gain over the baseline is told."""
    others = summary.filter(pl.col("label") != BASELINE)
    if len(others) == len(summary):
        return ["no gain: there is no run of the baseline"]
    if others.is_empty():
        return ["no gain: there are runs of the baseline only"]
    gains = [name for name in summary.columns if name.endswith("gain")]
    if all(others[name].is_null().all() for name in gains):
        return ["no gain: no method has the noise and the seed of a run of the baseline"]
    return []
