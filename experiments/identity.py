"""Which run it is, and whether the files in a folder are its own."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import tasks
from experiments.config import WITHOUT_EFFECT, RunConfig
from experiments.files import read_regular
from experiments.output import run_name

# --method is told by the methods' own options, and --device auto is another word for a device.
_NOT_COMPARED = WITHOUT_EFFECT | {"method", "device"}
_ABSENT = "not there"


@dataclass(frozen=True)
class RunIdentity:
    """The options of a run and the checksums of what it reads: all that its numbers depend on."""

    config: RunConfig
    checksums: dict[str, str]

    @property
    def name(self) -> str:
        return run_name(self.config, self.checksums)

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
            "data_sha256": self.checksums["data"],
        }

    def result(self, folder: Path) -> dict[str, Any] | None:
        """The outcome of the run in its folder; None unless it is finished there.

        A ValueError or OSError names the file that is damaged, or of another run.
        """
        path = folder / "config.json"
        config = _read(path)
        if config is not None:
            self._check_config(config, path)
        result = _read(folder / "result.json")
        if result is None:
            return None
        if config is None:
            raise _refused(path, "is missing, though the run is finished")
        self._check_result(result, folder / "result.json")
        _check_metrics(folder / "metrics.jsonl", result)
        return result

    def _check_config(self, config: dict[str, Any], path: Path) -> None:
        own = json.loads(json.dumps(self.config.flat(), default=str))
        _compare(config, own, sorted((own.keys() | config.keys()) - _NOT_COMPARED), path)

    def _check_result(self, result: dict[str, Any], path: Path) -> None:
        facts = self.facts()
        if "run" not in result:
            del facts["run"]  # written by an older version
        _compare(result, facts, list(facts), path)
        task = tasks.kind(self.config)
        for name in ("epochs_trained", "seconds", f"test_{task.SCORE}"):
            _require_number(result.get(name), name, path)
        try:
            task.summary(result)
        except (KeyError, TypeError, ValueError) as error:
            raise _refused(path, f"lacks a score ({error!r})") from error


def _compare(content: dict[str, Any], own: dict[str, Any], names: list[str], path: Path) -> None:
    for name in names:
        got, takes = content.get(name, _ABSENT), own.get(name, _ABSENT)
        if got != takes:
            raise _refused(
                path, f"is of another run: got {name} {got!s:.100}, this run has {takes}"
            )


def _check_metrics(path: Path, result: dict[str, Any]) -> None:
    """Whether they are the epochs of this result, all of them."""
    try:
        lines = read_regular(path).splitlines()
    except FileNotFoundError:
        lines = []
    epochs = [_object(line, path) for line in lines]
    trained = result["epochs_trained"]
    numbers = [epoch.get("epoch") for epoch in epochs]
    if len(epochs) != trained or numbers != list(range(1, len(epochs) + 1)):
        raise _refused(path, f"does not list the {trained} epochs of result.json")
    for epoch in epochs:
        _require_number(epoch.get("seconds"), "seconds", path)
    if not math.isclose(sum(epoch["seconds"] for epoch in epochs), result["seconds"]):
        raise _refused(path, "lists other epochs than those of result.json: they took other times")


def _require_number(value: object, name: str, path: Path) -> None:
    # Its size, as there are whole numbers that are no floats.
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise _refused(path, f"got {value!r:.100} as {name}, takes a number")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return _object(read_regular(path), path)
    except FileNotFoundError:
        return None


def _object(text: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"is malformed: {error}") from error
    if not isinstance(content, dict):
        raise _refused(path, f"is malformed: got {content!r:.100}, takes an object")
    return content


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"got {text}, takes finite numbers")
    return float(text)


def _refused(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} {what}; --restart runs it anew")
