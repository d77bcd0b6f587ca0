"""The folder of a run."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import nn

from experiments.config import RunConfig
from experiments.data.noise import NoisyLabels

# The result goes first and comes last: where there is one, everything else belongs to it.
_FILES = (
    "result.json",
    "model.safetensors",
    "metrics.jsonl",
    "noisy_labels.npz",
    "config.json",
)


def run_name(config: RunConfig, label: str, data_checksum: str) -> str:
    """A readable name that is equal for two runs only if they must give the same numbers."""
    identity = json.dumps({**config.identity(), "data": data_checksum}, sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return f"{config.dataset}-{label}-noise{config.noise:g}-seed{config.seed}-{digest}"


class RunFolder:
    """Writes each file of a run whole or not at all, after removing those of an older run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            (path / name).unlink(missing_ok=True)

    def write_config(self, config: dict[str, Any]) -> None:
        """The options of the run, as config.json."""
        self._write_text("config.json", json.dumps(config, indent=2, default=str) + "\n")

    def write_metrics(self, epochs: Iterable[dict[str, Any]]) -> None:
        """All epochs so far, as metrics.jsonl."""
        self._write_text("metrics.jsonl", "".join(json.dumps(epoch) + "\n" for epoch in epochs))

    def write_result(self, result: dict[str, Any]) -> None:
        """The outcome, as result.json."""
        self._write_text("result.json", json.dumps(result, indent=2) + "\n")

    def write_labels(self, labels: NoisyLabels) -> None:
        """The re-drawn indices, the true and the given labels, as noisy_labels.npz."""
        with (
            _atomic(self.path / "noisy_labels.npz") as temporary,
            temporary.open("wb") as file,
        ):
            np.savez_compressed(
                file,
                indices=labels.redrawn.numpy(),
                true=labels.true.numpy(),
                given=labels.given.numpy(),
            )

    def write_model(self, model: nn.Module) -> None:
        """Parameters and buffers, as model.safetensors."""
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        with _atomic(self.path / "model.safetensors") as temporary:
            temporary.write_bytes(save(state))

    def _write_text(self, name: str, text: str) -> None:
        with _atomic(self.path / name) as temporary:
            temporary.write_text(text)


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A path beside `path` that takes its place if the block succeeds and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
