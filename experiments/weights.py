"""The trained weights that a run leaves, read back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from experiments.config import RunConfig

if TYPE_CHECKING:
    from experiments.training import Trainer


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
        checksum = hashlib.sha256(path.read_bytes()).hexdigest()
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                shapes, trained_on = (
                    json.loads((file.metadata() or {}).get(name, "{}"))
                    for name in ("methods", "trained_on")
                )
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"--weights: {path} is not a model.safetensors: {error}") from error
        return cls(path, tensors, shapes, trained_on, checksum)

    @staticmethod
    def metadata(trainer: Trainer) -> dict[str, str]:
        """What `read` needs beside the tensors."""
        shapes = {name: m.shape(trainer.states[name]) for name, m in trainer.methods.items()}
        return {
            "methods": json.dumps(shapes, allow_nan=False),
            "trained_on": json.dumps(_trained_on(trainer.config), allow_nan=False),
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


def _trained_on(config: RunConfig) -> dict[str, Any]:
    """What says which subjects were trained on; nothing where there are no subjects."""
    if not config.detects_action_units:
        return {}
    names = ("dataset", "fold", "validation", "seed")
    return {name: value for name, value in config.flat().items() if name in names}
