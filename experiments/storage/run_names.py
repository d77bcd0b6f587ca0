"""How the folder of a run is named, and found again."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from experiments.config import WITHOUT_EFFECT, RunConfig
from experiments.methods import Method

_LONGEST = 150  # characters
_NAMED = {
    "train_size": "images",
    "validation": "validation",
    "noise_seed": "noise-seed",
    "weights": "weights",
    "epochs": "epochs",
    "batch_size": "batch",
    "lr": "lr",
    "schedule": "schedule",
    "augment": "augment",
    "precision": "precision",
    "compile": "compile",
    "cuda_graph": "cuda-graph",
}
"""Options that a name tells where they are not as usual, and how it calls them."""


def run_name(config: RunConfig, checksums: dict[str, Any]) -> str:
    """A readable name that is equal for two runs only if they must give the same numbers. It tells
    the methods, the noise and what is not as usual; the digest at its end stands for all options,
    and is the same in every version."""
    identity = config.identity() | checksums
    text = json.dumps(identity, sort_keys=True, default=str, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    end = f"-seed{config.seed}-{digest}"
    readable = "-".join([config.dataset, config.label, *_noise(config), *_unusual(config)])
    return readable[: _LONGEST - len(end)].rstrip("-+.") + end


def same_run(name: Any, other: str) -> bool:
    """Whether two names are of the same run, whatever else they tell."""
    return str(name).rpartition("-")[2] == other.rpartition("-")[2]


def folder_of(out: Path, name: str) -> Path:
    """Where the run of this name is or will be: an earlier version may have told less in front of
    the seed and the digest."""
    folder = out / name
    if folder.exists():
        return folder
    end = name[name.rindex("-seed") :]
    earlier = sorted(path for path in out.glob(f"?*{glob.escape(end)}") if path.is_dir())
    return earlier[0] if earlier else folder


def _noise(config: RunConfig) -> Iterator[str]:
    usual_kind = config.noise_kind in (None, config.recipe.noise_kind)
    if config.noise is None or not usual_kind:
        yield str(config.noise_kind)
    if config.noise is not None:
        yield f"noise{config.noise:g}"
    if config.task_options.part:
        yield config.task_options.part


def _unusual(config: RunConfig) -> Iterator[str]:
    """What would be otherwise if it had not been given, and is not in the label."""
    usual = {field.name: field.default for field in fields(config)} | config.usual
    for name, called in _NAMED.items():
        value = getattr(config, name)
        if value not in (None, usual[name]):
            yield _told(called, value if name != "weights" else True)
    yield from _of_task(config)
    for method in config.methods.values():
        yield from _of_method(method)


def _of_task(config: RunConfig) -> Iterator[str]:
    options, gpu = config.task_options, config.device == "cuda"
    for field in fields(options):
        value = getattr(options, field.name)
        if value == field.default or field.name in WITHOUT_EFFECT:
            continue
        without = replace(options, **{field.name: field.default}).resolved(config, gpu)
        if value != getattr(without, field.name) and without.part == options.part:
            yield _told(field.name, value)


def _of_method(method: Method) -> Iterator[str]:
    usual = type(method)().with_defaults()
    for field in fields(method):
        value, default = getattr(method, field.name), getattr(usual, field.name)
        if value == default or value is None:
            continue
        try:
            in_label = replace(method, **{field.name: default}).label != method.label
        except ValueError:  # does not go together with the others
            in_label = False
        if not in_label:
            yield _told(field.name, value)


def _told(name: str, value: Any) -> str:
    """An option and its value, such as lr0.01, schedule-cosine or no-augment."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    if isinstance(value, int | float):
        return f"{name}{value:g}" if isinstance(value, float) else f"{name}{value}"
    values = value if isinstance(value, tuple) else (value,)
    return "-".join([name, *(re.sub(r"[^\w.]+", "_", f"{value}") for value in values)])
