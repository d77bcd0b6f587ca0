"""Whether the two files of a run speak of the same run."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from experiments import methods, tasks
from experiments.config import label_of
from experiments.methods import BASELINE, METHODS, Method
from experiments.reporting.reading import POSITIVE, Fields, shown

_IN_BOTH = ("dataset", "noise", "noise_kind", "seed", "epochs", "fold")


def check(config: Fields, result: Fields) -> None:
    """A ValueError tells where the result is not that of the options."""
    for name in _IN_BOTH:
        if name in config.content and name in result.content:
            expected = config.content[name]
            takes = f"{shown(expected)} as in config.json"
            result.require(name, result.content[name] == expected, takes)
    _check_methods(config, result)


def check_seconds(path: Path | zipfile.Path, epochs: list[Fields], result: Fields) -> None:
    """The same for the epochs in metrics.jsonl: those of two runs never take the same time."""
    took = result.number("seconds", POSITIVE)
    seconds = sum(epoch.number("seconds", POSITIVE) for epoch in epochs)
    if not math.isclose(seconds, took):
        raise ValueError(
            f"{path}: of another run: its epochs took {seconds} s, those of result.json {took} s"
        )


def _check_methods(config: Fields, result: Fields) -> None:
    asked = config.text("method")
    names = result.text("method").split("+") if "method" in result.content else None
    if not {asked, *(names or ())} <= {BASELINE, *METHODS}:
        # Of another version: the label cannot be made again.
        if names:
            result.require("method", asked in (BASELINE, *names), f"{asked} as in config.json")
        return
    on = _methods(config, asked)
    if names:
        expected = "+".join(on) or asked
        takes = f"{expected} as in config.json"
        result.require("method", sorted(names) == sorted(expected.split("+")), takes)
    label = _label(config, on)
    if label is not None:
        takes = f"{label} as the options in config.json say"
        result.require("label", result.content["label"] == label, takes)


def _methods(config: Fields, asked: str) -> dict[str, Method]:
    """The methods that the options turn on."""
    content = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.content.items()
    }
    with _told(config):
        on = {
            name: method(
                **dict(method.LEGACY)
                | {f.name: content[f.name] for f in fields(method) if f.name in content}
            )
            for name, method in METHODS.items()
            if any(content.get(option) is not None for option in method.DEFAULTS)
        }
        return methods.chosen({asked, config.content.get("loss")}, methods.Options(**on))


def _label(config: Fields, on: dict[str, Method]) -> str | None:
    """None where an option is of a type that JSON turns into text, such as a path."""
    task = tasks.TASKS[tasks.of_dataset(config.content["dataset"])]
    with _told(config), contextlib.suppress(AttributeError):
        return label_of(on, task, config.content["epochs"])
    return None


@contextlib.contextmanager
def _told(config: Fields) -> Iterator[None]:
    """Names the file where a method does not take its options."""
    try:
        yield
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{config.place}: malformed options: {error!s:.200}") from error
