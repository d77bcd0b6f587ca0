"""The runs in a directory, and which of them can be compared."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from experiments.methods import BASELINE, METHODS
from experiments.reporting import packed
from experiments.reporting.finished_run import FinishedRun
from experiments.reporting.packed import Folder
from experiments.reporting.reading import Fields, exists
from experiments.terminal import amount

Run = TypeVar("Run", bound=FinishedRun)


def in_order(noises: Iterable[float | None]) -> list[float | None]:
    """Ascending; first where nobody knows it."""
    return sorted(noises, key=lambda noise: -math.inf if noise is None else noise)


@dataclass(frozen=True)
class Study(Generic[Run]):
    """Finished runs that differ in method, noise and seed only."""

    setup: dict[str, Any]
    runs: list[Run]

    @property
    def labels(self) -> list[str]:
        """The methods with their settings: the baseline, the defaults, and then the others."""
        return sorted({run.label for run in self.runs}, key=_order)

    @property
    def noises(self) -> list[float | None]:
        """The shares of noise, ascending."""
        return in_order({run.noise for run in self.runs})

    @property
    def seeds(self) -> list[tuple[int, int]]:
        """Of the training and of the noise, ascending."""
        return sorted({run.seeds for run in self.runs})

    def missing(self) -> list[str]:
        """What lacks for every method to have every noise and seed that any has."""
        there = {(run.label, run.noise, run.seeds) for run in self.runs}
        lines = []
        for label in self.labels:
            for seeds in self.seeds:
                lacking = [f"{n:g}" for n in self.noises if (label, n, seeds) not in there]
                if lacking:
                    lines.append(f"{label}, {name_seeds(*seeds)}: noise {', '.join(lacking)}")
        return lines


def name_seeds(seed: int, noise_seed: int) -> str:
    """For people to read."""
    return f"seed {seed}" if seed == noise_seed else f"seed {seed}, noise seed {noise_seed}"


def defaults() -> dict[str, str]:
    """Each method's label at its defaults, by its name; the baseline's first."""
    labels = {name: method().with_defaults().label for name, method in METHODS.items()}
    return {BASELINE: BASELINE} | labels


def method_of(label: str) -> str | None:
    """The name of the first method in a label; None where this version has no such method."""
    by_label = {label: name for name, label in defaults().items()}
    if label in by_label:
        return by_label[label]
    starts = {name.replace("_", "-"): name for name in (BASELINE, *METHODS)}
    # The longest, as one method's name may begin like another's.
    for start in sorted(starts, key=len, reverse=True):
        if re.match(re.escape(start) + r"(?![^\W\d_])", label):
            return starts[start]
    return None


def _order(label: str) -> tuple[int, str]:
    known = list(defaults().values())
    return (known.index(label) if label in known else len(known)), label


class Found(NamedTuple):
    """What is in a directory."""

    finished: list[FinishedRun]
    """The runs of the kind that was asked for."""
    unfinished: list[Folder]
    """The folders of those that have not ended."""
    left_out: list[str]
    """Of every folder that cannot be reported, which it is and why."""
    others: int
    """How many runs are of another kind."""


def find(directory: Path, kind: type[FinishedRun] = FinishedRun) -> Found:
    """The runs of a kind anywhere under a directory, each once."""
    finished, unfinished, left_out, others = [], [], [], 0
    for folder in sorted(packed.folders(directory), key=str):
        try:
            if folder.name == packed.NAME:
                raise ValueError(f"{folder}: is no zip file, or a damaged one")
            if not kind.is_on(_dataset(folder)):
                others += 1
            elif exists(folder / "result.json"):
                finished.append(kind.read(folder))
            else:
                unfinished.append(folder)
        except ValueError as error:
            left_out.append(str(error))
    kept, doubles = _without_doubles(finished)
    return Found(kept, unfinished, left_out + doubles, others)


def _dataset(folder: Folder) -> str | None:
    config = Fields.of_file(folder / "config.json")
    return config.text("dataset") if "dataset" in config.content else None


def _without_doubles(runs: list[FinishedRun]) -> tuple[list[FinishedRun], list[str]]:
    """Of the folders of one run the first, if all have the same numbers, or else none; and what is
    left out."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.study, *run.coordinates.values()].append(run)
    kept, left_out = [], []
    for first, *others in groups.values():
        if all(run.numbers == first.numbers for run in others):
            kept.append(first)
            left_out += [
                f"{run.folder}: the same run as {first.folder}, with the same numbers"
                for run in others
            ]
        else:
            folders = ", ".join(str(run.folder) for run in (first, *others))
            left_out.append(f"{folders}: the same run with different numbers; keep one")
    return kept, left_out


def studies(runs: Iterable[FinishedRun], kind: type[Study] = Study) -> list[Study]:
    """The runs by setup, the largest study first."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.study].append(run)
    found = [kind(group[0].setup, group) for group in groups.values()]
    return sorted(found, key=lambda study: -len(study.runs))


def titles(studies: list[Study]) -> list[str]:
    """Each study by the data set and the options in which the studies differ."""
    names = dict.fromkeys(name for study in studies for name in study.setup)
    differing = [
        name
        for name in names
        if name != "dataset" and len({str(s.setup.get(name)) for s in studies}) > 1
    ]
    return [
        ", ".join([study.setup["dataset"], *(_worded(n, study.setup.get(n)) for n in differing)])
        for study in studies
    ]


def _worded(name: str, value: Any) -> str:
    """An option with its value as one says it, such as 25 epochs or without augmentation."""
    if isinstance(value, bool):
        of = "augmentation" if name == "augment" else name
        return f"{'with' if value else 'without'} {of}"
    if isinstance(value, int) and name == "epochs":
        return amount(value, "epoch")
    if name == "weights" and value is None:
        return "from random weights"
    return f"{name} {value}"
