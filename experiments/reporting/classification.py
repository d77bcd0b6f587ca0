"""The report on runs on classification."""

import polars as pl

from experiments.reporting import comparison, data_size, figures, tables, widths
from experiments.reporting.finished_run import FinishedRun
from experiments.reporting.report import Report
from experiments.reporting.runs import Study


def _section(title: str, study: Study, summary: pl.DataFrame) -> str:
    return "\n\n".join([tables.study_section(title, study, summary), *widths.sections(study)])


REPORT = Report(
    command="figures",
    help="""Compare all finished runs on classification in a directory.

    Runs are compared only where everything but method, noise and seed is the same; a directory with
    several such setups gives several studies. Writes report.md (accuracy, memorisation,
    calibration, the gain over the baseline with its confidence interval, costs, and which runs are
    missing), runs.csv (one line a run), summary.csv (means over seeds) and the figures, as PNG and
    SVG: figure 1 (loss curves), figure 2 (accuracy and gain over noise, the published gains
    dashed), figure 3 (the settings of each method), memorisation over noise, and gain against
    memorisation; report.md says why one is missing. Studies that differ in --train-size alone,
    three or more, also give accuracy over the number of training images, with a line that is fitted
    over its logarithm. Networks of many widths also have tables of each width, in channels or in
    bits, and widths.csv.
    """,
    name="classification",
    run=FinishedRun,
    study=Study,
    summary=comparison.summary,
    section=_section,
    across=data_size.sections,
    draw=figures.draw_all,
    score=("test accuracy, %", "test_accuracy"),
    folder="report",
    csv="summary.csv",
    more={"widths.csv": widths.summary},
)
