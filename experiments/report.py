"""Finished runs beside each other: tables, figures, and what is missing."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    # Run as a script: import from the project root, not from this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib
import polars as pl
import tyro

from experiments.files import atomic
from experiments.reporting import comparison, escaping, tables
from experiments.reporting import figures as classification_figures
from experiments.reporting.action_units import comparison as action_unit_comparison
from experiments.reporting.action_units import figure as action_unit_figure
from experiments.reporting.action_units import tables as action_unit_tables
from experiments.reporting.action_units.runs import ActionUnitRun, ActionUnitStudy
from experiments.reporting.finished_run import FinishedRun
from experiments.reporting.runs import Study, find, studies, titles

Runs = tyro.conf.Positional[Path]
_NAMED = 10  # of the runs that are left out, in one line


def figures(runs: Runs = Path("runs"), out: Path | None = None) -> None:
    """Compare all finished runs on classification in a directory.

    Runs are compared only where everything but method, noise and seed is the same; a directory with
    several such setups gives several studies. Writes report.md (accuracy, memorisation,
    calibration, the gain over the baseline with its confidence interval, costs, and which runs are
    missing), runs.csv (one line a run), summary.csv (means over seeds) and the figures: figure 1
    (loss curves), figure 2 (accuracy and gain over noise, the published curves dashed), figure 3
    (settings of quantization, dropout and pruning), memorisation over noise, and gain against
    memorisation.

    A run whose files are damaged or contradict each other is left out; so are several results of
    one run, but for the first where all are equal. The report and stderr say which and why. In the
    CSV files, text that a spreadsheet would take for a formula begins with an apostrophe.

    Args:
        runs: directory of the runs, as given to run.py or sweep.py with --out; also below it.
        out: directory to write to. If not given: "report" in the directory of the runs.
    """
    _report(_CLASSIFICATION, runs, out or runs / "report")


def table1(runs: Runs = Path("runs"), out: Path | None = None) -> None:
    """Compare all finished runs on action units (AUs) in a directory.

    Runs are compared only where everything but method, norm of the head, noise, seed and fold is
    the same. Writes report.md (table 1 beside the published one, the gain over the baseline with
    its confidence interval, memorisation, costs, and which runs are missing), runs.csv (one line a
    run), table1.csv (means over folds and seeds) and table1.png (the gain of each method, and that
    of quantization for each AU). What is left out, and what is text in the CSV files, is as with
    figures.

    Args:
        runs: directory of the runs, as given to run.py or sweep.py with --out; also below it.
        out: directory to write to. If not given: "report-table1" in the directory of the runs.
    """
    _report(_ACTION_UNITS, runs, out or runs / "report-table1")


@dataclass(frozen=True)
class _Kind:
    """What is made of runs that can stand in one report."""

    name: str
    run: type[FinishedRun]
    study: type[Study]
    summary: Callable[[Study], pl.DataFrame]
    section: Callable[[str, Study, pl.DataFrame], str]
    draw: Callable[[list[tuple[str, Study, pl.DataFrame]], Path], list[Path]]
    csv: str
    """File of the summaries."""
    others: str
    """The command for all other runs."""


_CLASSIFICATION = _Kind(
    "classification",
    FinishedRun,
    Study,
    comparison.summary,
    tables.study_section,
    classification_figures.draw_all,
    csv="summary.csv",
    others="table1",
)
_ACTION_UNITS = _Kind(
    "action units",
    ActionUnitRun,
    ActionUnitStudy,
    action_unit_comparison.summary,
    action_unit_tables.study_section,
    action_unit_figure.draw_all,
    csv="table1.csv",
    others="figures",
)


def _report(kind: _Kind, runs: Path, out: Path) -> None:
    finished, unfinished, left_out, others = find(runs, kind.run)
    of_others = f"Other runs, left out: {others}; report.py {kind.others} is for them."
    if not finished:
        why = f" that can be reported: {'; '.join(left_out[:_NAMED])}" if left_out else ""
        hint = of_others if others else "experiments/run.py makes one."
        raise ValueError(f"{runs}: no finished run on {kind.name} in it{why}. {hint}")
    for reason in left_out:
        print(f"left out: {escaping.one_line(reason)}", file=sys.stderr)
    found = studies(finished, kind.study)
    names = titles(found)
    summaries = list(map(kind.summary, found))
    sections = list(map(kind.section, names, found, summaries))
    if unfinished:
        folders = [folder.name for folder in unfinished]
        sections.append(tables.bullets_section("Unfinished runs, left out", folders))
    if left_out:
        sections.append(tables.bullets_section("Left out", left_out))
    if others:
        sections.append(of_others)
    text = "\n\n".join(sections) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    _write_csv([comparison.by_run(study) for study in found], names, out / "runs.csv")
    _write_csv(summaries, names, out / kind.csv)
    with atomic(out / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)
    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a name is a $
        drawn = kind.draw(list(zip(names, found, summaries, strict=True)), out)
    for path in drawn:
        print(f"drawn to {path}")
    print(f"written to {out}")


def _write_csv(tables: list[pl.DataFrame], names: list[str], path: Path) -> None:
    named = [
        table.with_columns(pl.lit(name).alias("study"))
        for name, table in zip(names, tables, strict=True)
    ]
    with atomic(path) as temporary:
        table = pl.concat(named, how="diagonal_relaxed")
        texts = pl.col(pl.String).map_elements(escaping.csv, return_dtype=pl.String)
        table.with_columns(texts).write_csv(temporary)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every character
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"figures": figures, "table1": table1},
            description=__doc__,
            config=(tyro.conf.DisallowNone,),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {escaping.one_line(str(error))}")
