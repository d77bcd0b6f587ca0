"""The trained weights that a run leaves, read back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load
from torch import Tensor

from experiments.config import RunConfig
from experiments.files import read_bytes

if TYPE_CHECKING:
    from experiments.training import Trainer

_LARGEST = 2 << 30
"""InceptionV3 has 0.1 GB."""


@dataclass(frozen=True, eq=False)
class Weights:
    """A model.safetensors: tensors by name, what the methods did to the network's shape, and who
    was trained on."""

    path: Path
    tensors: dict[str, Tensor]
    shapes: dict[str, dict[str, Any]]
    trained_on: dict[str, Any]
    checksum: str

    @classmethod
    def read(cls, path: Path) -> Weights:
        """Raises ValueError where the file is not what a run writes."""
        try:
            blob = read_bytes(path, _LARGEST)
        except ValueError as error:
            raise ValueError(f"--weights: {error}") from error
        try:
            tensors = load(blob)
            shapes, trained_on = _metadata(blob)
        except Exception as error:  # a malformed file can raise almost anything
            raise ValueError(f"--weights: {path} is not a model.safetensors: {error}") from error
        return cls(path, tensors, shapes, trained_on, hashlib.sha256(blob).hexdigest())

    @staticmethod
    def metadata(trainer: Trainer) -> dict[str, str]:
        """What `read` needs beside the tensors."""
        shapes = {name: m.shape(trainer.states[name]) for name, m in trainer.methods.items()}
        return {
            "methods": json.dumps(shapes),
            "trained_on": json.dumps(_trained_on(trainer.config)),
        }

    def load_into(self, trainer: Trainer) -> None:
        """Raises ValueError where the network of the run is another one, or was trained on faces
        that the run tests or holds out."""
        here = _trained_on(trainer.config)
        if self.trained_on.get("dataset") == here.get("dataset") and self.trained_on != here:
            raise ValueError(
                f"--weights: {self.path} was trained on {self.trained_on}, takes {here}: this run "
                "would be tested on who it was trained on"
            )
        try:
            trainer.load_weights(self.tensors, self.shapes)
        except RuntimeError as error:
            raise ValueError(
                f"--weights: {self.path} does not fit this run's network; give the options of "
                f"method and dataset that it was trained with. {error}"
            ) from error


def _metadata(blob: bytes) -> list[dict[str, Any]]:
    """What the methods did to the network's shape, and who was trained on. The format begins with
    the length of a header in JSON."""
    length = int.from_bytes(blob[:8], "little")
    texts = json.loads(blob[8 : 8 + length]).get("__metadata__") or {}
    found = [json.loads(texts.get(name, "{}")) for name in ("methods", "trained_on")]
    if not all(isinstance(content, dict) for content in found):
        raise ValueError("its metadata are no objects")
    return found


def _trained_on(config: RunConfig) -> dict[str, Any]:
    """What says which subjects were trained on; nothing where there are no subjects."""
    if not config.detects_action_units:
        return {}
    names = ("dataset", "fold", "validation", "seed")
    return {name: value for name, value in config.flat().items() if name in names}
