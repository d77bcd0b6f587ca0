"""The runs in a directory, and which of them can be compared."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from experiments.config import WITHOUT_EFFECT
from experiments.methods import BASELINE, METHODS

# Where and how a run was made, rather than what it is.
_CIRCUMSTANCES = WITHOUT_EFFECT | {"device", "threads"}
_OF_METHODS = {"method"}.union(*({f.name for f in fields(method)} for method in METHODS.values()))
_COORDINATES = {"noise", "seed", "noise_seed"}


@dataclass(frozen=True)
class FinishedRun:
    """What a run wrote: its options, its metrics by epoch, and its result."""

    folder: Path
    config: dict[str, Any]
    epochs: list[dict[str, Any]]
    result: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """A ValueError tells which file is missing or malformed."""
        try:
            return cls(
                folder,
                config=json.loads((folder / "config.json").read_text()),
                epochs=[json.loads(line) for line in (folder / "metrics.jsonl").open()],
                result=json.loads((folder / "result.json").read_text()),
            )
        except FileNotFoundError as error:
            raise ValueError(f"{folder}: {Path(error.filename).name} is missing") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder}: a file of the run is malformed: {error}") from error

    @property
    def label(self) -> str:
        """The methods and their settings."""
        return self.result["label"]

    @property
    def noise(self) -> float:
        """The share of labels that noise touched; of human labels, the share that is wrong."""
        noise = self.config["noise"]
        return self.result["wrong_labels"] if noise is None else noise

    @property
    def seeds(self) -> tuple[int, int]:
        """Of the training and of the noise: runs that share them are a pair."""
        return self.config["seed"], self.config["noise_seed"]

    @property
    def setup(self) -> dict[str, Any]:
        """All that must be equal for two runs to be compared."""
        ignored = _CIRCUMSTANCES | _OF_METHODS | _COORDINATES
        options = {key: value for key, value in self.config.items() if key not in ignored}
        return options | {"data": self.result["data_sha256"][:8]}


@dataclass(frozen=True)
class Study:
    """Finished runs that differ in method, noise and seed only."""

    setup: dict[str, Any]
    runs: list[FinishedRun]

    @property
    def labels(self) -> list[str]:
        """The methods with their settings: the baseline, the defaults, and then the others."""
        return sorted({run.label for run in self.runs}, key=_order)

    @property
    def noises(self) -> list[float]:
        """The shares of noise, ascending."""
        return sorted({run.noise for run in self.runs})

    def missing(self) -> list[str]:
        """What lacks for every method to have every noise and seed that any has."""
        there = {(run.label, run.noise, run.seeds) for run in self.runs}
        lines = []
        for label in self.labels:
            for seeds in sorted({run.seeds for run in self.runs}):
                lacking = [f"{n:g}" for n in self.noises if (label, n, seeds) not in there]
                if lacking:
                    lines.append(f"{label}, {_seeds(*seeds)}: noise {', '.join(lacking)}")
        return lines


def _seeds(seed: int, noise_seed: int) -> str:
    return f"seed {seed}" if seed == noise_seed else f"seed {seed}, noise seed {noise_seed}"


def defaults() -> dict[str, str]:
    """Each method's label at its defaults, by its name; the baseline's first."""
    labels = {name: method().with_defaults().label for name, method in METHODS.items()}
    return {BASELINE: BASELINE} | labels


def _order(label: str) -> tuple[int, str]:
    known = list(defaults().values())
    return (known.index(label) if label in known else len(known)), label


def find(directory: Path) -> tuple[list[FinishedRun], list[Path]]:
    """The finished runs anywhere under a directory, and the folders of unfinished ones."""
    folders = sorted(path.parent for path in directory.rglob("config.json"))
    finished = [folder for folder in folders if (folder / "result.json").exists()]
    unfinished = [folder for folder in folders if folder not in finished]
    return [FinishedRun.read(folder) for folder in finished], unfinished


def studies(runs: Iterable[FinishedRun]) -> list[Study]:
    """The runs by setup, the largest study first; two results of one run are refused."""
    groups = defaultdict(list)
    for run in runs:
        groups[json.dumps(run.setup, sort_keys=True)].append(run)
    for group in groups.values():
        first: dict[tuple[Any, ...], FinishedRun] = {}
        for run in group:
            other = first.setdefault((run.label, run.noise, run.seeds), run)
            if other is not run:
                raise ValueError(f"{run.folder} and {other.folder} are the same run; keep one")
    found = [Study(group[0].setup, group) for group in groups.values()]
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
        ", ".join([study.setup["dataset"], *(f"{n} {study.setup.get(n)}" for n in differing)])
        for study in studies
    ]
