"""Finished runs beside each other: tables, figures, and what is missing."""

import sys
from pathlib import Path

if not __package__:
    # Run as a script: import from the project root, not from this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import matplotlib
import polars as pl
import tyro

from experiments import tasks, terminal
from experiments.arguments import require_understood
from experiments.checks import require_once
from experiments.command_line import filled
from experiments.reporting import comparison, escaping, packed, screen
from experiments.reporting.report import Report
from experiments.reporting.runs import find, studies, titles
from experiments.reporting.tables import bullets_section
from experiments.storage.files import atomic

_NAMED = 10  # of the runs that are left out, in one line
_USAGE = "{figures,table1,pack} [RUNS] [--out PATH]"
_HELP = """The whole report goes into report.md, a summary to the screen, with what the runs are not
    enough for. A run whose files are damaged or contradict each other is left out; so are several
    results of one run, but for the first where all are equal. The report and stderr say which and
    why. In the CSV files, text that a spreadsheet would take for a formula begins with an
    apostrophe."""
_STATUSES = """Exit status: 0 if it was written; 1 if there is nothing to report or it cannot be
    written; 2 if an option is wrong; 130 after Ctrl-C; 143 after SIGTERM, as of kill."""


@dataclass(frozen=True)
class _Command:
    """One of report.py: what it does with a directory of runs, and where its output goes."""

    help: str
    write: Callable[[Path, Path | None], None]
    out: str
    """What --out stands for."""

    def __call__(self, runs: Path, out: Path | None = None) -> None:
        self.write(runs, out)


REPORTS = [task.report() for task in tasks.TASKS.values()]


_PACK = """Write all finished runs in a directory into one file.

    The other commands read it as they read the folders of the runs. It has what they need: options,
    metrics and results, no weights. Options that say where things were on this machine are
    replaced. Runs that are damaged or unfinished are left out."""


def pack(runs: Path, out: Path | None = None) -> None:
    """Writes all finished runs in a directory into one file."""
    found = [find(runs, report.run) for report in REPORTS]
    finished = [run.folder for kind in found for run in kind.finished]
    if not finished:
        raise ValueError(f"{runs}: no finished run in it. experiments/run.py makes one.")
    for reason in sorted({reason for kind in found for reason in kind.left_out}):
        print(f"left out: {escaping.one_line(reason)}", file=sys.stderr)
    path = out or runs / packed.NAME
    if path.exists() and not path.is_file():
        raise ValueError(f"--out: got {path}, which is no regular file, takes the name of one")
    with _told_as_out():
        packed.pack(finished, path)
    count = terminal.amount(len(finished), "run")
    print(f"{count} written to {path}, {path.stat().st_size:,} bytes")


def _command(report: Report) -> _Command:
    def command(runs: Path, out: Path | None = None) -> None:
        write(report, runs, out or runs / report.folder)

    where = f'Directory to write to. If not given: "{report.folder}" in the directory of the runs.'
    return _Command(f"{report.help.strip()}\n\n{_HELP}", command, where)


COMMANDS = {report.command: _command(report) for report in REPORTS} | {
    "pack": _Command(
        _PACK, pack, f'The file. If not given: "{packed.NAME}" in the directory of the runs.'
    )
}


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
    shown = list(zip(names, found, summaries, strict=True))
    # A $ in a name is a $.
    with _told_as_out(), matplotlib.rc_context({"text.parse_math": False}):
        out.mkdir(parents=True, exist_ok=True)
        drawn = report.draw(shown, out)
    sections.append(drawn.section())
    if unfinished:
        folders = [folder.name for folder in unfinished]
        sections.append(bullets_section("Unfinished runs, left out", folders))
    if left_out:
        sections.append(bullets_section("Left out", left_out))
    if others:
        sections.append(of_others)
    text = "\n\n".join(sections) + "\n"
    files = ["report.md", "runs.csv", report.csv]
    with _told_as_out():
        _write_csv([comparison.by_run(study) for study in found], names, out / "runs.csv")
        _write_csv(summaries, names, out / report.csv)
        for name, table_of in report.more.items():
            tables = list(map(table_of, found))
            if any(len(table) for table in tables):
                _write_csv(tables, names, out / name)
                files.append(name)
        with atomic(out / "report.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(screen.overview(report, shown))
    if drawn.missing:
        print("not drawn:")
    for reason in drawn.missing:
        print(f"  {escaping.one_line(reason)}")
    for folder in unfinished:
        print(f"unfinished, left out: {escaping.one_line(folder.name)}")
    if others:
        print(of_others)
    files += [path.name for path in drawn.files if path.suffix == ".png"]
    as_svg = "; figures as SVG too" if drawn.files else ""
    print(f"written to {out}: {', '.join(files)}{as_svg}")


@contextlib.contextmanager
def _told_as_out() -> Iterator[None]:
    """Names the option whose value cannot be written to."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"--out: {terminal.told(error)}") from error


def _write_csv(tables: list[pl.DataFrame], names: list[str], path: Path) -> None:
    named = [
        table.with_columns(pl.lit(name).alias("study"))
        for name, table in zip(names, tables, strict=True)
    ]
    with atomic(path) as temporary:
        table = pl.concat(named, how="diagonal_relaxed")
        texts = pl.col(pl.String).map_elements(escaping.csv, return_dtype=pl.String)
        table.with_columns(texts).write_csv(temporary)


def main() -> int:
    """Gives the exit status; what a user can mend is told in one line."""
    name, *arguments = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(_overall_help())
        return 0
    try:
        if name not in COMMANDS:
            got = f"got {name}" if name else "got no command"
            raise ValueError(f"{got}, takes one of {', '.join(COMMANDS)} (see --help)")
        command = COMMANDS[name]
        require_once(arguments)
        require_understood(arguments, {"out": Path}, positional="RUNS")
        runs, out = _asked(name, command, arguments)
    except ValueError as error:
        return terminal.fail(error, terminal.REFUSED)
    try:
        if not runs.is_dir():
            what = "a file" if runs.exists() else "nothing there"
            raise ValueError(f"RUNS: got {runs}, {what}, takes the directory of runs")
        command(runs, out)
    except (ValueError, OSError) as error:
        return terminal.fail(error)
    return 0


def _asked(name: str, command: _Command, arguments: list[str]) -> tuple[Path, Path | None]:
    """The directory of the runs, and where to write."""

    def asked(
        runs: Annotated[
            Path,
            tyro.conf.Positional,
            tyro.conf.arg(
                metavar="[RUNS]",
                help="Directory of the runs, as given to run.py or sweep.py with --out; also those "
                "below it are read.",
            ),
        ] = Path("runs"),
        out: Annotated[Path | None, tyro.conf.arg(help=command.out, help_behavior_hint="")] = None,
    ) -> tuple[Path, Path | None]:
        return runs, out

    return tyro.cli(
        asked,
        prog=f"experiments/report.py {name}",
        args=arguments,
        description=filled(_paragraphs(command.help) + _paragraphs(_STATUSES)),
        config=(tyro.conf.DisallowNone,),
    )


def _overall_help() -> str:
    lines = [f"  {name:<9}{_paragraphs(command.help)[0]}" for name, command in COMMANDS.items()]
    return "\n\n".join(
        [
            f"usage: experiments/report.py {_USAGE}",
            filled([__doc__]),
            "\n".join(lines),
            filled(
                [
                    "What each of them writes: experiments/report.py figures --help, for instance.",
                    *_paragraphs(_STATUSES),
                ]
            ),
        ]
    )


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n")]


if __name__ == "__main__":
    sys.exit(terminal.run(main, "interrupted; nothing is half-written"))
