"""The runs in a directory, and which of them can be compared."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from experiments.config import WITHOUT_EFFECT
from experiments.data.au import AU_DATASETS
from experiments.methods import BASELINE, METHODS
from experiments.reporting import agreement
from experiments.reporting.options import require_type
from experiments.reporting.reading import (
    COUNT,
    DIFFERENCE,
    FINITE,
    POSITIVE,
    SHARE,
    Fields,
    Number,
)

# Where and how a run was made, rather than what it is.
_CIRCUMSTANCES = WITHOUT_EFFECT | {"device", "threads"}
_OF_METHODS = {"method"}.union(*({f.name for f in fields(method)} for method in METHODS.values()))


@dataclass(frozen=True)
class FinishedRun:
    """What a run on classification wrote, with types and ranges that are checked."""

    folder: Path
    label: str
    """The methods and their settings."""
    noise: float | None
    """The share of labels that noise touched; of human labels, the share that is wrong."""
    seeds: tuple[int, int]
    """Of the training and of the noise: runs that share them are a pair."""
    setup: dict[str, Any]
    """All that must be equal for two runs to be compared."""
    data: str
    """The beginning of the data's checksum."""
    epochs: list[dict[str, float | None]]
    """Of each epoch its number and what is named in `BY_EPOCH`."""
    measured: dict[str, float | None]
    """The numbers that are compared, by name; None where there is none."""

    MEASURED: ClassVar[dict[str, Number]] = {
        "wrong_labels": SHARE,
        "test_accuracy": SHARE,
        "test_loss": POSITIVE,
        "test_calibration_error": SHARE,
        "test_accuracy_at_best_validation": SHARE.or_null,
        "train_accuracy_clean": SHARE.or_null,
        "train_accuracy_flipped": SHARE.or_null,
        "flipped_predicted_true": SHARE.or_null,
        "accuracy_gap": DIFFERENCE,
        "loss_gap": FINITE,
        "epochs_trained": COUNT,
        "parameters": COUNT,
        "size_in_bits": COUNT,
        "macs": COUNT,
    }
    """The numbers of the result that are compared."""

    BY_EPOCH: ClassVar[dict[str, Number]] = {
        "loss": POSITIVE,
        "test_loss": POSITIVE.or_null,
        "train_accuracy_flipped": SHARE.or_null,
        "test_accuracy": SHARE.or_null,
    }

    VARIED: ClassVar[set[str]] = {"noise", "seed", "noise_seed"}
    """The options, beside those of methods, in which runs that are compared may differ."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """A ValueError tells which file is missing or what is wrong in it."""
        config = Fields.of_file(folder / "config.json")
        result = Fields.of_file(folder / "result.json")
        checked = cls._checked(config, result)
        return cls(folder, **checked, epochs=cls._epochs(folder, config, result))

    @staticmethod
    def is_on(dataset: str | None) -> bool:
        """Whether runs on a data set are of this kind."""
        return dataset not in AU_DATASETS

    @property
    def coordinates(self) -> dict[str, Any]:
        """What tells the run from those that it is compared with."""
        seed, noise_seed = self.seeds
        return {"label": self.label, "noise": self.noise, "seed": seed, "noise_seed": noise_seed}

    @property
    def study(self) -> Hashable:
        """Equal for runs that can be compared."""
        return json.dumps(self.setup, sort_keys=True)

    @property
    def numbers(self) -> tuple[Any, ...]:
        """All that a report can show of the run, beside what tells it from others."""
        return self.measured, self.epochs, self.data

    @classmethod
    def _checked(cls, config: Fields, result: Fields) -> dict[str, Any]:
        """The fields of the class from those of the files."""
        config.text("dataset")
        config.number("epochs", COUNT)
        label, data = result.text("label"), result.text("data_sha256")
        measured = {name: result.number(name, kind) for name, kind in cls.MEASURED.items()}
        is_checksum = re.fullmatch("[0-9a-f]{8,64}", data)
        result.require("data_sha256", bool(is_checksum), "8 to 64 hexadecimal digits")
        checked = {
            "label": label,
            "noise": cls._noise(config, measured),
            "seeds": (config.number("seed", COUNT), config.number("noise_seed", COUNT)),
            "setup": cls._setup(config) | {"data": data[:8]},
            "data": data[:8],
            "measured": measured,
        }
        agreement.check(config, result)
        return checked

    @classmethod
    def _noise(cls, config: Fields, measured: dict[str, float | None]) -> float | None:
        noise = config.number("noise", SHARE.or_null)
        return measured["wrong_labels"] if noise is None else noise

    @classmethod
    def _setup(cls, config: Fields) -> dict[str, Any]:
        ignored = _CIRCUMSTANCES | _OF_METHODS | cls.VARIED
        setup = {name: value for name, value in config.content.items() if name not in ignored}
        for name in setup:
            require_type(config, name)
        return setup

    @classmethod
    def _epochs(cls, folder: Path, config: Fields, result: Fields) -> list[dict[str, float | None]]:
        path = folder / "metrics.jsonl"
        planned, trained = config.content["epochs"], result.content["epochs_trained"]
        takes = f"1 to {planned}, the epochs in config.json" if planned else "0 as in config.json"
        result.require("epochs_trained", min(planned, 1) <= trained <= planned, takes)
        if not planned and not os.path.lexists(path):
            return []  # an evaluation
        epochs = []
        for number, line in enumerate(Fields.of_lines(path), 1):
            line.require("epoch", line.number("epoch", COUNT) == number, str(number))
            values = {name: line.number(name, kind) for name, kind in cls.BY_EPOCH.items()}
            epochs.append({"epoch": number} | values)
        if len(epochs) != trained:
            takes = f"the {trained} that result.json says were trained"
            raise ValueError(f"{path}: got {len(epochs)} epochs, takes {takes}")
        return epochs


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
    unfinished: list[Path]
    """The folders of those that have not ended."""
    left_out: list[str]
    """Of every folder that cannot be reported, which it is and why."""
    others: int
    """How many runs are of another kind."""


def find(directory: Path, kind: type[FinishedRun] = FinishedRun) -> Found:
    """The runs of a kind anywhere under a directory, each once."""
    finished, unfinished, left_out, others = [], [], [], 0
    for folder in _folders(directory):
        try:
            if not kind.is_on(_dataset(folder)):
                others += 1
            elif os.path.lexists(folder / "result.json"):
                finished.append(kind.read(folder))
            else:
                unfinished.append(folder)
        except ValueError as error:
            left_out.append(str(error))
    kept, doubles = _without_doubles(finished)
    return Found(kept, unfinished, left_out + doubles, others)


def _folders(directory: Path) -> list[Path]:
    walked = os.walk(directory)
    return sorted(
        Path(folder)
        for folder, inner, files in walked
        if not {"config.json", "result.json"}.isdisjoint(inner + files)
    )


def _dataset(folder: Path) -> str | None:
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
        ", ".join([study.setup["dataset"], *(f"{n} {study.setup.get(n)}" for n in differing)])
        for study in studies
    ]
