"""Markdown: table 1, and what it does not show."""

import functools
import statistics

import polars as pl

from experiments.methods import BASELINE
from experiments.reporting import escaping, tables
from experiments.reporting.action_units.published import AS_PUBLISHED, AVERAGE, Published
from experiments.reporting.action_units.runs import SCORES, ActionUnitStudy, of_au
from experiments.reporting.tables import Row, cell, gain_cell, markdown, mean_cell

_TITLES = dict(
    zip(
        SCORES,
        (
            "against the annotators, at probability 0.5",
            "against the annotators, at chosen thresholds",
            "against the truth, at probability 0.5",
            "against the truth, at chosen thresholds",
        ),
        strict=True,
    )
)
_COSTS = tables.COSTS | {
    "epoch chosen": ("epoch_chosen", 1, ".1f"),
    "epochs trained": ("epochs_trained", 1, ".1f"),
    "forward passes a sample": ("forward_passes", 1, ".1f"),
    "backward passes a sample": ("backward_passes", 1, ".1f"),
}
_READING = (
    "Means over the folds {folds}, then over the seeds that have all of them (n, where there are "
    "several), ± standard deviation over these seeds. The last column is the standard deviation "
    "over the AUs of a row. Thresholds are chosen for each AU on held-out training subjects, the "
    "epoch by their F1 at probability 0.5."
)
_PUBLISHED = (
    "*Published*: Table 1 of arXiv 2303.11803, BP4D with InceptionV3, against the annotators, mean "
    "of 5 runs."
)
_NOT_THE_SAME = (
    " **Ours is {encoder} on {dataset}: levels cannot be compared.** The published rows are there "
    "for the differences between methods."
)


def study_section(title: str, study: ActionUnitStudy, summary: pl.DataFrame) -> str:
    """All tables of a study, with what it is and what it lacks."""
    paper = Published.of(study)
    parts = [
        *tables.introduction(title, study),
        _READING.format(folds=", ".join(map(str, study.folds))),
    ]
    if paper:
        ours = {name: escaping.markdown(study.setup[name]) for name in ("encoder", "dataset")}
        is_same = ours == {"encoder": "inception_v3", "dataset": "bp4d"}
        parts.append(_PUBLISHED + ("" if is_same else _NOT_THE_SAME.format(**ours)))
    if study.drawn_differently():
        parts.append(
            "Runs with the same noise and noise seed had different data (see `data` in runs.csv): "
            "the faces were drawn by other code or on another kind of machine."
        )
    scores = [score for score in SCORES if f"{score}_mean" in summary.columns]
    for noise in study.noises:
        if study.noise_varies:
            parts.append(f"### noise {noise:g}")
        at_noise = summary.filter(pl.col("noise").eq_missing(noise))
        rows = {row["label"]: row for row in at_noise.iter_rows(named=True)}
        parts += [
            _table1(study, rows, score, paper if score == AS_PUBLISHED else None)
            for score in scores
        ]
        parts.append(_gains(study, rows, scores, paper))
        if "train_wrong_fitted_mean" in summary.columns:
            parts.append(_memorisation(study, rows))
    if study.noise_varies:
        parts.append("### Over the noise")
        for score in scores:
            name = f"gain of average F1 {_TITLES[score]}, points, {tables.INTERVAL}"
            gain = functools.partial(gain_cell, name=f"{score}_gain", form="+.2f")
            parts.append(tables.grid(name, study, summary, gain))
    parts.append(tables.costs(study, summary, _COSTS))
    parts += tables.missing(study, "every noise, seed and fold")
    return "\n\n".join(parts)


def _table1(
    study: ActionUnitStudy, rows: dict[str, Row], score: str, paper: Published | None
) -> str:
    header = [f"F1 {_TITLES[score]}, %", *(f"AU {au}" for au in study.aus), AVERAGE, "± over AUs"]
    body, italic = [], []
    for label in study.labels:
        row = rows.get(label)
        of_aus = [
            cell(row[f"{of_au(score, au)}_mean"] if row else None, ".1f", 100) for au in study.aus
        ]
        over_aus = cell(row[f"{score}_over_aus"] if row else None, ".1f", 100)
        body.append([label, *of_aus, mean_cell(row, score), over_aus])
        if paper and label in paper.f1:
            published = [paper.f1[label][str(au)] for au in study.aus]
            values = [*published, paper.f1[label][AVERAGE], statistics.stdev(published)]
            italic.append(len(body))
            body.append([f"{label}, published", *(f"{value:.1f}" for value in values)])
    return markdown(header, body, italic)


def _gains(
    study: ActionUnitStudy, rows: dict[str, Row], scores: list[str], paper: Published | None
) -> str:
    header = [f"gain of average F1 over the baseline, points, {tables.INTERVAL}"]
    for score in scores:
        header += [_TITLES[score], "won, of fold and seed pairs"]
    if paper:
        header.append("published")
    body = []
    for label in study.labels:
        if label == BASELINE:
            continue
        row = rows.get(label)
        cells = [label]
        for score in scores:
            cells += [gain_cell(row, f"{score}_gain", "+.2f"), _won(row, score)]
        if paper:
            cells.append(cell(paper.gain(label), "+.1f"))
        body.append(cells)
    return markdown(header, body)


def _won(row: Row | None, score: str) -> str:
    if row is None or row["fold_pairs"] is None:
        return "-"
    return f"{row[f'{score}_won']} of {row['fold_pairs']}"


def _memorisation(study: ActionUnitStudy, rows: dict[str, Row]) -> str:
    measures = {
        "wrong ones fitted": "train_wrong_fitted",
        "right ones fitted": "train_right_fitted",
        "that are wrong": "wrong_labels",
    }
    body = [
        [label, *(mean_cell(rows.get(label), measure) for measure in measures.values())]
        for label in study.labels
    ]
    return markdown(["training labels, %", *measures], body)
