"""Finished runs beside each other, as a table and as a figure."""

import sys
from pathlib import Path

if not __package__:
    # Run as a script: import from the project root, not from this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
from dataclasses import dataclass
from typing import Any

import tyro

RESULTS = {
    "test_accuracy": "test accuracy",
    "train_accuracy_clean": "right training labels fitted",
    "train_accuracy_flipped": "wrong training labels fitted",
}
CURVES = {
    "loss": "training loss",
    "train_accuracy_flipped": "wrong training labels fitted",
    "test_accuracy": "test accuracy",
}
# Where a run was made and with what, rather than what it is.
CIRCUMSTANCES = {"out", "data_dir", "download", "threads", "backend"}


@dataclass(frozen=True)
class FinishedRun:
    """What a run wrote: its options, its metrics by epoch, and its result."""

    config: dict[str, Any]
    epochs: list[dict[str, Any]]
    result: dict[str, Any]


def read(folder: Path) -> FinishedRun:
    """Reads the folder of a run; a ValueError tells which file is missing or malformed."""
    try:
        return FinishedRun(
            config=json.loads((folder / "config.json").read_text()),
            epochs=[json.loads(line) for line in (folder / "metrics.jsonl").open()],
            result=json.loads((folder / "result.json").read_text()),
        )
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: not a finished run, {error.filename} is missing") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}: a file of the run is malformed: {error}") from error


def names(runs: list[FinishedRun]) -> list[str]:
    """Each run by the options in which the runs differ."""
    options = [option for option in runs[0].config if option not in CIRCUMSTANCES]
    differing = [
        option for option in options if len({str(run.config.get(option)) for run in runs}) > 1
    ]
    return [
        ", ".join(
            f"{value}" if option == "method" else f"{option} {value}"
            for option in differing or ["method"]
            for value in [run.config.get(option)]
        )
        for run in runs
    ]


def table(runs: list[FinishedRun]) -> str:
    """The results as Markdown, one row a run."""
    lines = ["| run | " + " | ".join(RESULTS.values()) + " |", "|---|" + "---:|" * len(RESULTS)]
    for name, run in zip(names(runs), runs, strict=True):
        shares = [run.result[key] for key in RESULTS]
        cells = ["-" if share is None else f"{share:.2%}" for share in shares]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: list[FinishedRun], path: Path) -> None:
    """Draws the curves over the epochs."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(4 * len(CURVES), 3.4), layout="constrained")
    axes = figure.subplots(1, len(CURVES))
    for (metric, title), axis in zip(CURVES.items(), axes, strict=True):
        for name, run in zip(names(runs), runs, strict=True):
            values = [float("nan") if e[metric] is None else e[metric] for e in run.epochs]
            axis.plot([epoch["epoch"] for epoch in run.epochs], values, label=name)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def report(folders: tyro.conf.Positional[tuple[Path, ...]], figure: Path | None = None) -> None:
    """Compare finished runs: prints a Markdown table and, if asked, draws their curves.

    Args:
        folders: the folders of the runs, as experiments/run.py names them in its last line.
        figure: where to draw the curves; the ending chooses the format (.png, .svg, .pdf).
    """
    if not folders:
        raise ValueError("got no folder of a run, takes one or more")
    runs = [read(folder) for folder in folders]
    print(table(runs))
    if figure is not None:
        draw(runs, figure)
        print(f"\ndrawn to {figure}")


if __name__ == "__main__":
    try:
        tyro.cli(report)
    except ValueError as error:
        sys.exit(f"error: {error}")
