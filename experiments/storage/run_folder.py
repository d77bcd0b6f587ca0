"""The folder of a run."""

import fcntl
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import nn

from experiments.storage.files import atomic, open_lock, remove_temporaries
from experiments.training import checkpoints
from experiments.training.history import EpochMetrics

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


class Busy(OSError):
    """Another process is at work on the run."""


class RunFolder:
    """The files of a run, each written whole or not at all. One process at a time can have it; what
    killed ones left half-written is removed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = open_lock(path / ".lock")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"{path}: another process is at work on this run") from error
        remove_temporaries(path, _FILES)

    def clear(self) -> None:
        """Removes what an older run left."""
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)

    def write_config(self, config: dict[str, Any]) -> None:
        """The options of the run, as config.json."""
        self._write_text("config.json", _json(config, indent=2, default=str))

    def write_metrics(self, history: list[EpochMetrics]) -> None:
        """All epochs so far, as metrics.jsonl."""
        self._write_text("metrics.jsonl", "".join(_json(epoch.flat()) for epoch in history))

    def write_result(self, result: dict[str, Any]) -> None:
        """The outcome, as result.json."""
        self._write_text("result.json", _json(result, indent=2))

    def write_labels(self, labels: dict[str, Any]) -> None:
        """The given labels and what is known of the true ones, as noisy_labels.npz."""
        with atomic(self.path / "noisy_labels.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **labels)

    def write_model(self, model: nn.Module, metadata: dict[str, str]) -> None:
        """Parameters and buffers, as model.safetensors."""
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        with atomic(self.path / "model.safetensors") as temporary:
            temporary.write_bytes(_in_order(save(state, metadata)))

    def _write_text(self, name: str, text: str) -> None:
        with atomic(self.path / name) as temporary:
            temporary.write_text(text)


def _in_order(safetensors: bytes) -> bytes:
    """The same with its metadata sorted, which the library writes in an order of chance: equal
    models are equal files, with one checksum."""
    end = 8 + int.from_bytes(safetensors[:8], "little")
    header = json.loads(safetensors[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + safetensors[end:]


def _json(content: dict[str, Any], **layout: Any) -> str:
    """With finite numbers only: other programs take no others."""
    return json.dumps(content, allow_nan=False, **layout) + "\n"
