"""The runs in a directory, and which of them can be compared."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from experiments.config import WITHOUT_EFFECT
from experiments.data.au import AU_DATASETS
from experiments.methods import BASELINE, METHODS

# Where and how a run was made, rather than what it is.
_CIRCUMSTANCES = WITHOUT_EFFECT | {"device", "threads"}
_OF_METHODS = {"method"}.union(*({f.name for f in fields(method)} for method in METHODS.values()))


@dataclass(frozen=True)
class FinishedRun:
    """What a run on classification wrote: its options, its metrics by epoch, and its result."""

    folder: Path
    config: dict[str, Any]
    epochs: list[dict[str, Any]]
    result: dict[str, Any]

    MEASURED: ClassVar[tuple[str, ...]] = (
        "wrong_labels",
        "test_accuracy",
        "test_loss",
        "test_calibration_error",
        "test_accuracy_at_best_validation",
        "train_accuracy_clean",
        "train_accuracy_flipped",
        "flipped_predicted_true",
        "accuracy_gap",
        "loss_gap",
        "epochs_trained",
        "parameters",
        "size_in_bits",
        "macs",
    )
    """The numbers of the result that are compared."""

    VARIED: ClassVar[set[str]] = {"noise", "seed", "noise_seed"}
    """The options, beside those of methods, in which runs that are compared may differ."""

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """A ValueError tells which file is missing or malformed."""
        metrics = folder / "metrics.jsonl"
        try:
            return cls(
                folder,
                config=_read(folder / "config.json"),
                epochs=[
                    _object(line, f"{metrics}, line {number}")
                    for number, line in enumerate(metrics.read_bytes().splitlines(), 1)
                ],
                result=_read(folder / "result.json"),
            )
        except FileNotFoundError as error:
            raise ValueError(f"{folder}: {Path(error.filename).name} is missing") from error

    @staticmethod
    def is_on(dataset: str | None) -> bool:
        """Whether runs on a data set are of this kind."""
        return dataset not in AU_DATASETS

    @property
    def label(self) -> str:
        """The methods and their settings."""
        return self.of_result("label")

    @property
    def noise(self) -> float | None:
        """The share of labels that noise touched; of human labels, the share that is wrong."""
        noise = self.option("noise")
        return self.of_result("wrong_labels") if noise is None else noise

    @property
    def seeds(self) -> tuple[int, int]:
        """Of the training and of the noise: runs that share them are a pair."""
        return self.option("seed"), self.option("noise_seed")

    @property
    def coordinates(self) -> dict[str, Any]:
        """What tells the run from those that it is compared with."""
        noise, (seed, noise_seed) = self.noise, self.seeds
        return {
            "label": self.label,
            "noise": None if noise is None else float(noise),
            "seed": seed,
            "noise_seed": noise_seed,
        }

    @property
    def setup(self) -> dict[str, Any]:
        """All that must be equal for two runs to be compared."""
        ignored = _CIRCUMSTANCES | _OF_METHODS | self.VARIED
        options = {key: value for key, value in self.config.items() if key not in ignored}
        return options | {"data": self.data}

    @property
    def data(self) -> str:
        """The beginning of the data's checksum."""
        return self.of_result("data_sha256")[:8]

    def measured(self) -> dict[str, float | None]:
        """The numbers that are compared, by name; None where there is none."""
        return {name: self.number(name, self.of_result(name)) for name in self.MEASURED}

    def option(self, name: str) -> Any:
        """An option of the run; a ValueError names the file where it is not."""
        return self._get("config.json", self.config, name)

    def of_result(self, name: str) -> Any:
        """A value of the result; a ValueError names the file where it is not."""
        return self._get("result.json", self.result, name)

    def number(self, name: str, value: Any) -> float | None:
        """The value of the result; a ValueError names the file where it is no number."""
        if value is None or isinstance(value, int | float):
            return value
        raise ValueError(f"{self.folder}/result.json: got {value!r} as {name}, takes a number")

    def _get(self, file: str, content: dict[str, Any], name: str) -> Any:
        if name not in content:
            raise ValueError(f"{self.folder}/{file}: lacks {name}")
        return content[name]


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
    def noises(self) -> list[float | None]:
        """The shares of noise, ascending."""
        return sorted({run.noise for run in self.runs})

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


def _order(label: str) -> tuple[int, str]:
    known = list(defaults().values())
    return (known.index(label) if label in known else len(known)), label


class Found(NamedTuple):
    """What is in a directory."""

    finished: list[FinishedRun]
    """The runs of the kind that was asked for."""
    unfinished: list[Path]
    """The folders of those that have not ended."""
    others: int
    """How many runs are of another kind."""


def find(directory: Path, kind: type[FinishedRun] = FinishedRun) -> Found:
    """The runs of a kind anywhere under a directory."""
    configs = {path.parent: _read(path) for path in sorted(directory.rglob("config.json"))}
    folders = [folder for folder in configs if kind.is_on(configs[folder].get("dataset"))]
    finished = [folder for folder in folders if (folder / "result.json").exists()]
    unfinished = [folder for folder in folders if folder not in finished]
    return Found(list(map(kind.read, finished)), unfinished, len(configs) - len(folders))


def studies(runs: Iterable[FinishedRun], kind: type[Study] = Study) -> list[Study]:
    """The runs by setup, the largest study first; two results of one run are refused."""
    groups = defaultdict(list)
    for run in runs:
        groups[json.dumps(run.setup, sort_keys=True)].append(run)
    for group in groups.values():
        first: dict[tuple[Any, ...], FinishedRun] = {}
        for run in group:
            other = first.setdefault(tuple(run.coordinates.values()), run)
            if other is not run:
                raise ValueError(f"{run.folder} and {other.folder} are the same run; keep one")
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
        ", ".join([study.setup["dataset"], *(f"{n} {study.setup.get(n)}" for n in differing)])
        for study in studies
    ]


def _read(path: Path) -> dict[str, Any]:
    return _object(path.read_bytes(), str(path))


def _object(text: bytes, place: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: malformed: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{place}: malformed: got {content!r}, takes an object")
    return content
