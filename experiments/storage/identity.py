"""Which run it is, and whether the files in a folder are its own."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import LEGACY, TOLD_BY_METHODS, WITHOUT_EFFECT, FilledConfig
from experiments.reporting import agreement
from experiments.reporting.reading import COUNT, FINITE, POSITIVE, SHARE, Fields
from experiments.storage.files import refuse_link
from experiments.storage.run_names import run_name, same_run

_BESIDE_A_RUN = "log.txt"  # which a sweep begins before its run
_MOST_DIFFERENCES = 5  # in a message
# The device of a CPU has had two names.
_NOT_COMPARED = WITHOUT_EFFECT | TOLD_BY_METHODS | {"device"}


@dataclass(frozen=True)
class RunIdentity:
    """The options of a run and what else its numbers depend on, such as checksums of its data."""

    config: FilledConfig
    beside: dict[str, Any]

    @property
    def name(self) -> str:
        return run_name(self.config, self.beside)

    def facts(self) -> dict[str, Any]:
        """What result.json says of the run itself."""
        config = self.config
        return {
            "run": self.name,
            "label": config.label,
            "dataset": config.dataset,
            "noise": config.noise,
            "noise_kind": config.noise_kind,
            "seed": config.seed,
            "epochs": config.epochs,
            "data_sha256": self.beside["data"],
        }

    def result(self, folder: Path) -> dict[str, Any] | None:
        """The outcome of the run in its folder; None unless it is finished there.

        A ValueError names the file that is damaged, or of another run.
        """
        try:
            return self._result(folder)
        except ValueError as error:
            raise ValueError(f"{error}; --restart runs it anew") from error

    def require_own(self, folder: Path) -> None:
        """Raises a ValueError where the user's name for the run is that of another one's folder, or
        of one that no run has made; generated names are of one run each."""
        if self.config.name is None or not folder.exists():
            return
        try:
            if not self._config(folder):
                self._require_empty(folder)
            result = _fields(folder / "result.json")
            if result:
                self._check_run(result)
        except ValueError as error:
            raise ValueError(
                f"--name: {error}; choose another name, or remove that folder"
            ) from error

    def _require_empty(self, folder: Path) -> None:
        names = {path.name for path in folder.iterdir() if path.name[0] != "."} - {_BESIDE_A_RUN}
        if names:
            raise ValueError(f"{folder}: is no run's folder: it has {min(names)}, no config.json")

    def _config(self, folder: Path) -> Fields | None:
        config = _fields(folder / "config.json")
        if config:
            own = json.loads(json.dumps(self.config.flat(), default=str))
            _compare(config, own, sorted((own.keys() | config.content.keys()) - _NOT_COMPARED))
        return config

    def _result(self, folder: Path) -> dict[str, Any] | None:
        config = self._config(folder)
        result = _fields(folder / "result.json")
        if not result:
            return None
        if not config:
            raise ValueError(f"{folder}: config.json is missing")
        self._check(result)
        _check_metrics(folder / "metrics.jsonl", result)
        return result.content

    def _check_run(self, result: Fields) -> None:
        """Older versions did not write which run it is."""
        name = result.content.get("run", self.name)
        if not same_run(name, self.name):
            raise ValueError(
                f"{result.place}: of another run: got {name!s:.200} as run, takes {self.name}"
            )

    def _check(self, result: Fields) -> None:
        self._check_run(result)
        facts = self.facts()
        _compare(result, facts, [name for name in facts if name != "run"])
        result.number("epochs_trained", COUNT)
        result.number("seconds", POSITIVE)
        task = self.config.task
        result.number(f"test_{task.SCORE}", SHARE)
        for name in task.OBJECTS:
            result.object(name)
        _require_finite(result)


def _compare(fields: Fields, own: dict[str, Any], names: Iterable[str]) -> None:
    differences = []
    for name in names:
        unsaid = LEGACY.get(name, "nothing")
        got, takes = (content.get(name, unsaid) for content in (fields.content, own))
        if got != takes:
            differences.append(f"got {got!s:.200} as {name}, takes {takes}")
    if differences:
        more = len(differences) - _MOST_DIFFERENCES
        told = differences[:_MOST_DIFFERENCES] + ([f"{more} more"] if more > 0 else [])
        raise ValueError(f"{fields.place}: of another run: {'; '.join(told)}")


def _check_metrics(path: Path, result: Fields) -> None:
    """Whether they are the epochs of this result, all of them."""
    there = os.path.lexists(path)
    if there:
        refuse_link(path)
    epochs = list(Fields.of_lines(path)) if there else []
    for number, epoch in enumerate(epochs, 1):
        epoch.require("epoch", epoch.number("epoch", COUNT) == number, str(number))
        _require_finite(epoch)
    trained = result.content["epochs_trained"]
    if len(epochs) != trained:
        raise ValueError(f"{path}: got {len(epochs)} epochs, result.json has {trained}")
    agreement.check_seconds(path, epochs, result)


def _require_finite(fields: Fields) -> None:
    for name, value in fields.content.items():
        if isinstance(value, float):
            fields.number(name, FINITE)
        elif isinstance(value, dict):
            _require_finite(fields.object(name))


def _fields(path: Path) -> Fields | None:
    if not os.path.lexists(path):
        return None
    refuse_link(path)
    return Fields.of_file(path)
