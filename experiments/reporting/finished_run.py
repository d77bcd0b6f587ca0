"""What a finished run wrote into its folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from experiments import tasks
from experiments.config import TOLD_BY_METHODS, WITHOUT_EFFECT
from experiments.methods import METHODS
from experiments.reporting import agreement
from experiments.reporting.options import require_type
from experiments.reporting.packed import Folder
from experiments.reporting.reading import (
    COUNT,
    DIFFERENCE,
    FINITE,
    POSITIVE,
    SHARE,
    SIZE,
    Fields,
    Number,
    exists,
    shown,
)

_COSTS = ("parameters", "size_in_bits", "macs")
# Where and how a run was made, rather than what it is.
_CIRCUMSTANCES = WITHOUT_EFFECT | {"device", "threads"}
_OF_METHODS = TOLD_BY_METHODS | {f.name for method in METHODS.values() for f in fields(method)}


@dataclass(frozen=True)
class FinishedRun:
    """What a run on classification wrote, with types and ranges that are checked."""

    folder: Folder
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
    by_width: dict[float, dict[str, float | None]]
    """Those at each width of a network that has several: in bits, from 2, or as a share of the
    channels, up to 1."""

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
        "forward_passes": POSITIVE,
        "backward_passes": POSITIVE,
        "parameters": COUNT,
        "size_in_bits": COUNT,
        "macs": COUNT,
        "additions": COUNT.or_null,
        "lookups": COUNT.or_null,
    }
    """The numbers of the result that are compared."""

    BY_WIDTH: ClassVar[dict[str, Number]] = {
        "test_accuracy": SHARE,
        "train_accuracy_flipped": SHARE.or_null,
        "train_accuracy_clean": SHARE.or_null,
        "parameters": COUNT.or_null,
        "size_in_bits": COUNT.or_null,
        "macs": COUNT.or_null,
    }
    """Those at a width."""

    BY_EPOCH: ClassVar[dict[str, Number]] = {
        "loss": FINITE,
        "test_loss": POSITIVE.or_null,
        "train_accuracy_flipped": SHARE.or_null,
        "test_accuracy": SHARE.or_null,
    }

    VARIED: ClassVar[set[str]] = {"noise", "seed", "noise_seed"}
    """The options, beside those of methods, in which runs that are compared may differ."""

    @classmethod
    def read(cls, folder: Folder) -> Self:
        """A ValueError tells which file is missing or what is wrong in it."""
        config = Fields.of_file(folder / "config.json")
        result = as_written_now(Fields.of_file(folder / "result.json"))
        checked = cls._checked(config, result)
        return cls(folder, **checked, epochs=cls._epochs(folder, config, result))

    TASK: ClassVar[str] = "classification"

    @classmethod
    def is_on(cls, dataset: str | None) -> bool:
        """Whether runs on a data set are of this kind."""
        return tasks.of_dataset(dataset) == cls.TASK

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
        return self.measured, self.by_width, self.epochs, self.data

    @classmethod
    def _checked(cls, config: Fields, result: Fields) -> dict[str, Any]:
        """The fields of the class from those of the files."""
        config.text("dataset")
        config.number("epochs", COUNT)
        if "train_size" in config.content:
            config.number("train_size", SIZE.or_null)
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
            "by_width": cls._by_width(result),
        }
        agreement.check(config, result)
        return checked

    @classmethod
    def _by_width(cls, result: Fields) -> dict[float, dict[str, float | None]]:
        if "by_width" not in result.content:
            return {}
        found, numbers = result.object("by_width"), {}
        for name in found.content:
            at_width = _with_defaults(found.object(name), **dict.fromkeys(_COSTS))
            measured = {key: at_width.number(key, kind) for key, kind in cls.BY_WIDTH.items()}
            numbers[_width(found, name)] = measured
        return numbers

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
        legacy = tasks.TASKS[cls.TASK].OPTIONS.LEGACY
        return setup | {name: value for name, value in legacy.items() if name not in setup}

    @classmethod
    def _epochs(
        cls, folder: Folder, config: Fields, result: Fields
    ) -> list[dict[str, float | None]]:
        path = folder / "metrics.jsonl"
        planned, trained = config.content["epochs"], result.content["epochs_trained"]
        takes = f"1 to {planned}, the epochs in config.json" if planned else "0 as in config.json"
        result.require("epochs_trained", min(planned, 1) <= trained <= planned, takes)
        if not planned and not exists(path):
            return []  # an evaluation
        epochs, lines = [], list(Fields.of_lines(path))
        for number, line in enumerate(lines, 1):
            line.require("epoch", line.number("epoch", COUNT) == number, str(number))
            values = {name: line.number(name, kind) for name, kind in cls.BY_EPOCH.items()}
            epochs.append({"epoch": number} | values)
        if len(epochs) != trained:
            takes = f"the {trained} that result.json says were trained"
            raise ValueError(f"{path}: got {len(epochs)} epochs, takes {takes}")
        agreement.check_seconds(path, lines, result)
        return epochs


def as_written_now(result: Fields) -> Fields:
    """A result with the names of this version, and what earlier ones did not write: the passes that
    a sample took, which were one an epoch, and costs that are not known."""
    content = dict(result.content)
    if "modes" in content:
        content.setdefault("by_width", content.pop("modes"))
    result = _with_defaults(Fields(result.place, content), additions=None, lookups=None)
    trained = content.get("epochs_trained")
    if trained is None:
        return result
    return _with_defaults(result, forward_passes=trained, backward_passes=trained)


def _with_defaults(fields: Fields, **values: Any) -> Fields:
    return Fields(fields.place, values | fields.content)


def _width(fields: Fields, name: str) -> float:
    """A width from its name."""
    try:
        width = float(name)
    except ValueError:
        width = math.nan
    if not (0 < width <= 1 or width in (*range(2, 9), 32)):
        takes = "a share of the channels, above 0 up to 1, or bits, 2 to 8 or 32"
        raise ValueError(f"{fields.place}: got the width {shown(name)}, takes {takes}")
    return width
