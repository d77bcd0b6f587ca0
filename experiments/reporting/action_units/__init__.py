"""Table 1 of arXiv 2303.11803, how well facial action units (AUs) are told, from our runs."""

from experiments.reporting.action_units import comparison, figure, tables
from experiments.reporting.action_units.published import AS_PUBLISHED
from experiments.reporting.action_units.runs import ActionUnitRun, ActionUnitStudy
from experiments.reporting.report import Report

REPORT = Report(
    command="table1",
    help="""Compare all finished runs on action units (AUs) in a directory.

    Runs are compared only where everything but method, norm of the head, noise, seed and fold is
    the same. Writes report.md (table 1 beside the published one, the gain over the baseline with
    its confidence interval, memorisation, costs, and which runs are missing), runs.csv (one line a
    run), table1.csv (means over folds and seeds), table1.png and table1.svg (the gain of each
    method, and that of quantization for each AU).
    """,
    name="action units",
    run=ActionUnitRun,
    study=ActionUnitStudy,
    summary=comparison.summary,
    section=tables.study_section,
    across=lambda studies: [],
    draw=figure.draw_all,
    score=("test F1 against the annotators, %", AS_PUBLISHED),
    folder="report-table1",
    csv="table1.csv",
)
