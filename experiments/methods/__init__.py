"""Training methods, by the name that `--method` takes."""

import dataclasses
from typing import Any

from experiments.methods.baseline import Baseline
from experiments.methods.quant import Quant

__all__ = ["METHODS", "Baseline", "Quant", "build", "options"]

METHODS: dict[str, type[Baseline]] = {"baseline": Baseline, "quant": Quant}


def options(method: type[Baseline]) -> list[str]:
    """The names of the run's options that `method` reads."""
    return [field.name for field in dataclasses.fields(method)]


def build(config: Any) -> Baseline:
    """The method `config.method`, with its options taken from `config`."""
    method = METHODS[config.method]
    return method(**{name: getattr(config, name) for name in options(method)})
