"""Finished runs beside each other: tables, figures, and what is missing."""

import sys
from pathlib import Path

if not __package__:
    # Run as a script: import from the project root, not from this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import polars as pl
import tyro

from experiments.reporting import figures, statistics, tables
from experiments.reporting.runs import find, studies, titles


def report(runs: tyro.conf.Positional[Path] = Path("runs"), out: Path | None = None) -> None:
    """Compare all finished runs in a directory.

    Runs are compared only where everything but method, noise and seed is the same; a directory with
    several such setups gives several studies. Writes report.md (accuracy, memorisation,
    calibration, the gain over the baseline with its confidence interval, costs, and which runs are
    missing), runs.csv (one line a run), summary.csv (means over seeds) and the figures: figure 1
    (loss curves), figure 2 (accuracy and gain over noise, the published curves dashed), figure 3
    (settings of quantization, dropout and pruning), memorisation over noise, and gain against
    memorisation.

    Args:
        runs: directory of the runs, as given to run.py or sweep.py with --out; also below it.
        out: directory to write to. If not given: "report" in the directory of the runs.
    """
    finished, unfinished = find(runs)
    if not finished:
        raise ValueError(f"{runs}: no finished run in it; experiments/run.py makes one")
    out = out or runs / "report"
    out.mkdir(parents=True, exist_ok=True)
    found = studies(finished)
    names = titles(found)
    summaries = [statistics.summary(study) for study in found]
    _write_csv([statistics.by_run(study) for study in found], names, out / "runs.csv")
    _write_csv(summaries, names, out / "summary.csv")
    sections = list(map(tables.study_section, names, found, summaries))
    if unfinished:
        sections.append(tables.unfinished_section(unfinished))
    text = "\n\n".join(sections) + "\n"
    (out / "report.md").write_text(text)
    print(text)
    for path in figures.draw_all(list(zip(names, found, summaries, strict=True)), out):
        print(f"drawn to {path}")
    print(f"written to {out}")


def _write_csv(tables: list[pl.DataFrame], names: list[str], path: Path) -> None:
    named = [
        table.with_columns(pl.col("label").cast(pl.String), pl.lit(name).alias("study"))
        for name, table in zip(names, tables, strict=True)
    ]
    pl.concat(named, how="diagonal_relaxed").write_csv(path)


if __name__ == "__main__":
    try:
        tyro.cli(report)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
