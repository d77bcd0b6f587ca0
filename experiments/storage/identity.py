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
from experiments.storage.run_folder import run_name

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

    def _result(self, folder: Path) -> dict[str, Any] | None:
        config = _fields(folder / "config.json")
        if config:
            own = json.loads(json.dumps(self.config.flat(), default=str))
            _compare(config, own, sorted((own.keys() | config.content.keys()) - _NOT_COMPARED))
        result = _fields(folder / "result.json")
        if not result:
            return None
        if not config:
            raise ValueError(f"{folder}: config.json is missing")
        self._check(result)
        _check_metrics(folder / "metrics.jsonl", result)
        return result.content

    def _check(self, result: Fields) -> None:
        # Older versions did not write which run it is.
        facts = {k: v for k, v in self.facts().items() if k != "run" or k in result.content}
        _compare(result, facts, facts)
        result.number("epochs_trained", COUNT)
        result.number("seconds", POSITIVE)
        task = self.config.task
        result.number(f"test_{task.SCORE}", SHARE)
        for name in task.OBJECTS:
            result.object(name)
        _require_finite(result)


def _compare(fields: Fields, own: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        unsaid = LEGACY.get(name, "nothing")
        got, takes = (content.get(name, unsaid) for content in (fields.content, own))
        if got != takes:
            raise ValueError(
                f"{fields.place}: of another run: got {got!s:.200} as {name}, takes {takes}"
            )


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
