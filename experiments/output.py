"""The folder of a run."""

import fcntl
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import nn

from experiments import checkpoints
from experiments.config import RunConfig
from experiments.files import atomic

# The result goes first and comes last: where there is one, everything else belongs to it.
_FILES = (
    "result.json",
    "model.safetensors",
    checkpoints.LAST,
    checkpoints.BEFORE,
    "metrics.jsonl",
    "noisy_labels.npz",
    "config.json",
)


def run_name(config: RunConfig, checksums: dict[str, str]) -> str:
    """A readable name that is equal for two runs only if they must give the same numbers."""
    identity = config.identity() | checksums
    text = json.dumps(identity, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    noise = config.noise_kind if config.noise is None else f"noise{config.noise:g}"
    fold = f"-fold{config.faces.fold}" if config.detects_action_units else ""
    return f"{config.dataset}-{config.label}-{noise}{fold}-seed{config.seed}-{digest}"


class RunFolder:
    """The files of a run, each written whole or not at all. One process at a time can have it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = (path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"{path}: another process is at work on this run") from error

    def clear(self) -> None:
        """Removes what an older run left."""
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)

    def result(self) -> dict[str, Any] | None:
        """The outcome, if the run is finished."""
        try:
            return json.loads((self.path / "result.json").read_text())
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}/result.json is malformed: {error}") from error

    def write_config(self, config: dict[str, Any]) -> None:
        """The options of the run, as config.json."""
        self._write_text("config.json", json.dumps(config, indent=2, default=str) + "\n")

    def write_metrics(self, epochs: Iterable[dict[str, Any]]) -> None:
        """All epochs so far, as metrics.jsonl."""
        self._write_text("metrics.jsonl", "".join(json.dumps(epoch) + "\n" for epoch in epochs))

    def write_result(self, result: dict[str, Any]) -> None:
        """The outcome, as result.json."""
        self._write_text("result.json", json.dumps(result, indent=2) + "\n")

    def write_labels(self, labels: dict[str, np.ndarray]) -> None:
        """The given labels and what is known of the true ones, as noisy_labels.npz."""
        with atomic(self.path / "noisy_labels.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **labels)

    def write_model(self, model: nn.Module, metadata: dict[str, str]) -> None:
        """Parameters and buffers, as model.safetensors."""
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        with atomic(self.path / "model.safetensors") as temporary:
            temporary.write_bytes(save(state, metadata))

    def _write_text(self, name: str, text: str) -> None:
        with atomic(self.path / name) as temporary:
            temporary.write_text(text)
