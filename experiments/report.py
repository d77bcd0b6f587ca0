"""Finished runs beside each other: tables, figures, and what is missing."""

import sys
from pathlib import Path

if not __package__:
    # Run as a script: import from the project root, not from this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import io
from collections.abc import Callable

import matplotlib
import polars as pl
import tyro

from experiments import tasks
from experiments.reporting import comparison, escaping, packed
from experiments.reporting.report import Report
from experiments.reporting.runs import find, studies, titles
from experiments.reporting.tables import bullets_section
from experiments.storage.files import atomic

Runs = tyro.conf.Positional[Path]
_NAMED = 10  # of the runs that are left out, in one line
_HELP = """
    A run whose files are damaged or contradict each other is left out; so are several results of
    one run, but for the first where all are equal. The report and stderr say which and why. In the
    CSV files, text that a spreadsheet would take for a formula begins with an apostrophe.

    Args:
        runs: directory of the runs, as given to run.py or sweep.py with --out; also below it.
        out: directory to write to. If not given: "{folder}" in the directory of the runs.
"""


def _command(report: Report) -> Callable[..., None]:
    def command(runs: Runs = Path("runs"), out: Path | None = None) -> None:
        write(report, runs, out or runs / report.folder)

    command.__doc__ = report.help + _HELP.format(folder=report.folder)
    return command


REPORTS = [task.report() for task in tasks.TASKS.values()]


def pack(runs: Runs = Path("runs"), out: Path | None = None) -> None:
    """Writes all finished runs in a directory into one file.

    The other commands read it as they read the folders of the runs. It has what they need: options,
    metrics and results, no weights. Options that say where things were on this machine are
    replaced. Runs that are damaged or unfinished are left out.

    Args:
        runs: directory of the runs, as given to run.py or sweep.py with --out; also below it.
        out: the file. If not given: "runs.zip" in the directory of the runs.
    """
    found = [find(runs, report.run) for report in REPORTS]
    finished = [run.folder for kind in found for run in kind.finished]
    if not finished:
        raise ValueError(f"{runs}: no finished run in it. experiments/run.py makes one.")
    for reason in sorted({reason for kind in found for reason in kind.left_out}):
        print(f"left out: {escaping.one_line(reason)}", file=sys.stderr)
    path = out or runs / packed.NAME
    packed.pack(finished, path)
    print(f"{len(finished)} runs written to {path}, {path.stat().st_size:,} bytes")


COMMANDS = {report.command: _command(report) for report in REPORTS} | {"pack": pack}


def write(report: Report, runs: Path, out: Path) -> None:
    """Writes the report of the runs in a directory."""
    finished, unfinished, left_out, others = find(runs, report.run)
    commands = " or ".join(other.command for other in REPORTS if other is not report)
    of_others = f"Other runs, left out: {others}; report.py {commands} is for them."
    if not finished:
        why = f" that can be reported: {'; '.join(left_out[:_NAMED])}" if left_out else ""
        hint = of_others if others else "experiments/run.py makes one."
        raise ValueError(f"{runs}: no finished run on {report.name} in it{why}. {hint}")
    for reason in left_out:
        print(f"left out: {escaping.one_line(reason)}", file=sys.stderr)
    found = studies(finished, report.study)
    names = titles(found)
    summaries = list(map(report.summary, found))
    sections = list(map(report.section, names, found, summaries)) + report.across(found)
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a name is a $
        drawn = report.draw(list(zip(names, found, summaries, strict=True)), out)
    sections.append(drawn.section())
    if unfinished:
        folders = [folder.name for folder in unfinished]
        sections.append(bullets_section("Unfinished runs, left out", folders))
    if left_out:
        sections.append(bullets_section("Left out", left_out))
    if others:
        sections.append(of_others)
    text = "\n\n".join(sections) + "\n"
    _write_csv([comparison.by_run(study) for study in found], names, out / "runs.csv")
    _write_csv(summaries, names, out / report.csv)
    for name, table_of in report.more.items():
        tables = list(map(table_of, found))
        if any(len(table) for table in tables):
            _write_csv(tables, names, out / name)
    with atomic(out / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)
    for path in drawn.files:
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every character
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            description=__doc__,
            config=(tyro.conf.DisallowNone,),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {escaping.one_line(str(error))}")
