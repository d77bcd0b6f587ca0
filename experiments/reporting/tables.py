"""Markdown."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import polars as pl

from experiments.reporting import escaping
from experiments.reporting.runs import Study

Row = dict[str, Any]
MEASURES = {
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
COSTS = {
    "parameters": ("parameters", 1, ",.0f"),
    "kB": ("size_in_bits", 1 / 8e3, ",.1f"),
    "million MACs": ("macs", 1e-6, ".2f"),
    "of them additions": ("additions", 1e-6, ".2f"),
    "lookups": ("lookups", 1, ",.0f"),
    "epochs trained": ("epochs_trained", 1, "g"),
}
_RARE = ("additions", "lookups")
"""Costs that most networks do not have: their columns are there if any has."""
BUDGET = "forward + backward passes a sample"
INTERVAL = "± half a 95 % confidence interval of the paired difference"


def study_section(title: str, study: Study, summary: pl.DataFrame) -> str:
    """All tables of a study, with what it is and what it lacks."""
    parts = [
        *introduction(title, study),
        "Mean ± standard deviation over seeds (n of them where methods differ in it).",
    ]
    for name, (measure, factor) in MEASURES.items():
        if f"{measure}_mean" in summary.columns:
            mean = functools.partial(mean_cell, measure=measure, factor=factor)
            budget = measure.startswith("test_accuracy")
            parts.append(grid(name, study, summary, mean, budget))
    name = f"gain over the baseline, points of test accuracy, {INTERVAL}"
    parts.append(grid(name, study, summary, gain_cell, budget=True))
    parts.append(costs(study, summary))
    parts += missing(study, "every noise and seed")
    return "\n\n".join(parts)


def introduction(title: str, study: Study) -> list[str]:
    """The title, and all that the runs of the study have in common."""
    setup = escaping.markdown(", ".join(f"{name} {value}" for name, value in study.setup.items()))
    seeds = ", ".join(map(str, sorted({seed for seed, _ in study.seeds})))
    return [f"## {escaping.markdown(title)}", f"{len(study.runs)} runs, seeds {seeds}: {setup}."]


def missing(study: Study, what: str) -> list[str]:
    """The runs that the study lacks for every method to have `what`."""
    lines = study.missing()
    return [f"Missing, for every method to have {what}:", _bullets(lines)] if lines else []


def bullets_section(title: str, lines: list[str]) -> str:
    """What stands in no table, such as the runs that are left out."""
    return f"## {title}\n\n{_bullets(lines)}"


def grid(
    name: str,
    study: Study,
    summary: pl.DataFrame,
    cell_of: Callable[[Row | None], str],
    budget: bool = False,
) -> str:
    """A cell for each label, downwards, and noise, across; in front, if so, what training took."""
    rows = {(row["label"], row["noise"]): row for row in summary.iter_rows(named=True)}
    header = [name, *([BUDGET] * budget), *(f"noise {noise:g}" for noise in study.noises)]
    body = [
        [
            label,
            *([_budget(summary.filter(label=label))] * budget),
            *(cell_of(rows.get((label, noise))) for noise in study.noises),
        ]
        for label in study.labels
    ]
    return markdown(header, body)


def _budget(rows: pl.DataFrame) -> str:
    names = ("forward_passes_mean", "backward_passes_mean")
    return " + ".join(cell(mean_of(rows[name]), ".4g") for name in names)


def costs(
    study: Study, summary: pl.DataFrame, columns: dict[str, tuple[str, float, str]] = COSTS
) -> str:
    """What each label takes: by the column's title a measure, its factor and its format."""
    columns = {
        title: column
        for title, column in columns.items()
        if column[0] not in _RARE or _any_has(summary, column[0])
    }
    body = []
    for label in study.labels:
        rows = summary.filter(label=label)
        values = [
            cell(mean_of(rows[f"{measure}_mean"]), form, factor)
            for measure, factor, form in columns.values()
        ]
        body.append([label, *values])
    return markdown(["cost", *columns], body)


def _any_has(summary: pl.DataFrame, measure: str) -> bool:
    return f"{measure}_mean" in summary.columns and bool((summary[f"{measure}_mean"] > 0).any())


def mean_cell(row: Row | None, measure: str, form: str = ".2f", factor: float = 100) -> str:
    """A mean over seeds and its standard deviation."""
    if row is None:
        return cell(None, form)
    mean, deviation = row[f"{measure}_mean"], row[f"{measure}_std"]
    return cell(mean, form, factor, deviation, row["seeds"])


def gain_cell(row: Row | None, name: str = "gain", form: str = "+.1f") -> str:
    """A gain in points, and half of its confidence interval."""
    if row is None:
        return cell(None, form)
    return cell(row[name], form, 100, row[f"{name}_half_width"], row["pairs"])


def mean_of(numbers: pl.Series) -> float | None:
    """None where there are none."""
    mean: Any = numbers.mean()
    return mean


def cell(
    value: float | None,
    form: str,
    factor: float = 1,
    spread: float | None = None,
    count: int | None = None,
) -> str:
    """The value, formatted as `form` says, with its spread and, above 1, of how many it is."""
    if value is None:
        return "-"
    around = "" if spread is None else f" ± {factor * spread:{form.removeprefix('+')}}"
    of = f" (n {count})" if count and count > 1 else ""
    return f"{factor * value:{form}}{around}{of}"


def markdown(header: list[str], body: list[list[str]], italic: Collection[int] = ()) -> str:
    """A table, its first column left-aligned, some rows in italics."""
    header, *body = [[escaping.markdown(text) for text in line] for line in (header, *body)]
    for row in italic:
        body[row] = [f"*{text}*" for text in body[row]]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {escaping.markdown(line)}" for line in lines)
