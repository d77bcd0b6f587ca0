"""The trained weights that a run leaves, read back."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load
from torch import Tensor

from experiments.checks import flag
from experiments.config import RunConfig
from experiments.storage.files import read_bytes
from experiments.terminal import told

if TYPE_CHECKING:
    from experiments.training.loop import Trainer

_LARGEST = 2 << 30
"""InceptionV3 has 0.1 GB."""


@dataclass(frozen=True, eq=False)
class Weights:
    """A model.safetensors: tensors by name, what the methods did to the network's shape, which
    samples were trained on, and the options that change what the network computes."""

    path: Path
    tensors: dict[str, Tensor]
    shapes: dict[str, dict[str, Any]]
    trained_on: dict[str, Any]
    computed_with: dict[str, Any] | None
    """None in files of older versions, which do not tell."""
    checksum: str

    @classmethod
    def read(cls, path: Path) -> Weights:
        """Raises ValueError where the file is not what a run writes."""
        try:
            blob = read_bytes(path, _LARGEST)
        except (ValueError, OSError) as error:
            raise ValueError(f"--weights: {told(error)}") from error
        try:
            tensors = load(blob)
            shapes, trained_on, computed_with = _metadata(blob)
        except Exception as error:  # a malformed file can raise almost anything
            raise ValueError(f"--weights: {path} is not a model.safetensors: {error}") from error
        if computed_with is None:
            warnings.warn(
                f"--weights: {path} does not tell the options that it was trained with, such as "
                "bits: those of this run are taken",
                stacklevel=2,
            )
        checksum = hashlib.sha256(blob).hexdigest()
        return cls(path, tensors, shapes or {}, trained_on or {}, computed_with, checksum)

    @staticmethod
    def metadata(trainer: Trainer) -> dict[str, str]:
        """What `read` needs beside the tensors."""
        shapes = {name: m.shape(trainer.states[0][name]) for name, m in trainer.methods.items()}
        return {
            "methods": json.dumps(shapes, allow_nan=False),
            "trained_on": json.dumps(_trained_on(trainer.config), allow_nan=False),
            "computed_with": json.dumps(_computed_with(trainer.config), allow_nan=False),
        }

    def load_into(self, trainer: Trainer) -> None:
        """Raises ValueError where the network of the run is another one, computes something else,
        or was trained on other samples of the run's data set."""
        self._check_options(trainer.config)
        here = _trained_on(trainer.config)
        same_data = self.trained_on.get("dataset") == here["dataset"]
        if same_data and any(here.get(name) != value for name, value in self.trained_on.items()):
            raise ValueError(
                f"--weights: {self.path} was trained on {self.trained_on}, takes {here}: this run "
                f"would be tested on samples it was trained on, or normalize its input otherwise"
            )
        try:
            trainer.load_weights(self.tensors, self.shapes)
        except Exception as error:  # there can be anything in it
            what = str(error).replace("\n", " ")
            raise ValueError(
                f"--weights: {self.path} does not fit this run's network; give the options of "
                f"method and dataset that it was trained with. {what:.500}"
            ) from error

    def _check_options(self, config: RunConfig) -> None:
        here = _computed_with(config)
        there = here if self.computed_with is None else self.computed_with
        differing = [name for name in here | there if here.get(name) != there.get(name)]
        for method in config.methods.values():
            options = method.evaluation_options()
            if method.STARTS_FROM_FLOAT and not options.keys() & there.keys():
                differing = [name for name in differing if name not in options]
        if differing:
            had, has = (
                ", ".join(
                    f"{flag(name)} {options[name]}" if name in options else f"no {flag(name)}"
                    for name in differing
                )
                for options in (there, here)
            )
            raise ValueError(
                f"--weights: {self.path} does not fit this run's network: it was trained with "
                f"{had}; this run has {has}"
            )


def _computed_with(config: RunConfig) -> dict[str, Any]:
    """The options that change what the network makes of a picture, beside its weights."""
    options: dict[str, Any] = {}
    for method in config.methods.values():
        options |= method.evaluation_options()
    return options | config.task_options.evaluation_options()


def _metadata(blob: bytes) -> list[dict[str, Any] | None]:
    """What the methods did to the network's shape, who was trained on, and with which options;
    None where the file does not tell. The format begins with the length of a header in JSON."""
    length = int.from_bytes(blob[:8], "little")
    texts = json.loads(blob[8 : 8 + length]).get("__metadata__") or {}
    names = ("methods", "trained_on", "computed_with")
    found = [json.loads(texts.get(name, "null")) for name in names]
    if not all(isinstance(content, dict | None) for content in found):
        raise ValueError("its metadata are no objects")
    return found


def _trained_on(config: RunConfig) -> dict[str, Any]:
    """What says which samples were trained on, and so how the network's input is normalized."""
    names = list(config.task_options.TRAINED_ON)
    if config.validation:
        names.append("seed")
    return {name: value for name, value in config.flat().items() if name in names}
