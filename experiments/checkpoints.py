"""Checkpoints of a run: the last one, and the one before it in case the last is damaged."""

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import torch

from experiments.files import atomic

LAST, BEFORE = "checkpoint.pt", "checkpoint-before.pt"
_DIGEST = hashlib.sha256
_DIGEST_SIZE = _DIGEST().digest_size


class Checkpoints:
    """The files checkpoint.pt and checkpoint-before.pt: a SHA-256 of the rest, then `torch.save`.

    They are read as weights only, so that a file from elsewhere cannot run anything.
    """

    def __init__(self, folder: Path) -> None:
        self.last = folder / LAST
        self.before = folder / BEFORE

    def save(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint; a process that is killed meanwhile leaves one that can be read."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getvalue()
        with atomic(self.last) as temporary:
            temporary.write_bytes(_DIGEST(payload).digest() + payload)
            if self.last.exists():
                self.last.replace(self.before)

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint that is whole; None without one. Tells of a damaged one."""
        for path in (self.last, self.before):
            try:
                blob = path.read_bytes()
            except FileNotFoundError:
                continue
            digest, payload = blob[:_DIGEST_SIZE], blob[_DIGEST_SIZE:]
            if _DIGEST(payload).digest() == digest:
                return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            print(f"{path}: damaged (checksum), going back one checkpoint", file=sys.stderr)
        return None

    def remove(self) -> None:
        """Removes both, once the run is finished."""
        self.last.unlink(missing_ok=True)
        self.before.unlink(missing_ok=True)
