"""Checkpoints of a run: the last one, and the one before it in case the last is damaged."""

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import torch

from experiments.storage.files import atomic, read_bytes, refuse_link
from experiments.storage.run_names import same_run

LAST, BEFORE = "checkpoint.pt", "checkpoint-before.pt"
_FORMAT = 4
_ONE_NETWORK = 3  # the format before, of a single network
_LARGEST = 1 << 34  # bytes
_DIGEST = hashlib.sha256
_DIGEST_SIZE = _DIGEST().digest_size


class Checkpoints:
    """The files checkpoint.pt and checkpoint-before.pt: a SHA-256 of the rest, then `torch.save` of
    a format, the name of the run and its state.

    They are read as weights only, so that a file from elsewhere cannot run anything.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.last = folder / LAST
        self.before = folder / BEFORE
        self.run = run

    def save(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint; a process that is killed meanwhile leaves one that can be read."""
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, "run": self.run, "state": state}, buffer)
        payload = buffer.getvalue()
        with atomic(self.last, before=self.before) as temporary:
            temporary.write_bytes(_DIGEST(payload).digest() + payload)

    def load(self) -> dict[str, Any] | None:
        """The state in the last checkpoint that is whole; None without one. Tells of a damaged one.

        A ValueError names a file that is whole but no checkpoint of this run.
        """
        for path in (self.last, self.before):
            refuse_link(path)
            try:
                blob = read_bytes(path, _LARGEST)
            except FileNotFoundError:
                continue
            digest, payload = blob[:_DIGEST_SIZE], blob[_DIGEST_SIZE:]
            if _DIGEST(payload).digest() != digest:
                print(f"{path}: damaged (checksum), going back one checkpoint", file=sys.stderr)
                continue
            state = self._state(payload, path)
            if path == self.before:
                # Or else the next checkpoint would put the damaged one in the place of this one.
                self.before.replace(self.last)
            return state
        return None

    def _state(self, payload: bytes, path: Path) -> dict[str, Any]:
        try:
            saved = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            form = saved["format"]
            if form in (_FORMAT, _ONE_NETWORK):
                run, state = saved["run"], saved["state"]
        except Exception as error:  # what torch raises for a malformed file is of many kinds
            raise self.refused(f"holds no checkpoint ({error!r:.100})", path) from error
        if form not in (_FORMAT, _ONE_NETWORK):
            raise self.refused(f"has format {form!r:.100}, this version takes {_FORMAT}", path)
        if not same_run(run, self.run):
            raise self.refused(f"is of the run {run!s:.200}, this one is {self.run}", path)
        if not isinstance(state, dict):
            raise self.refused(f"holds {type(state).__name__} as the state, takes dict", path)
        if form == _ONE_NETWORK:
            try:
                return _migrated(**state)
            except TypeError as error:
                raise self.refused(f"holds no state of format {form} ({error})", path) from error
        return state

    def refused(self, what: object, path: Path | None = None) -> ValueError:
        """The error about a checkpoint, the last one unless told otherwise."""
        return ValueError(f"{path or self.last}: {what}; --restart starts anew without it")

    def remove(self) -> None:
        """Removes both, once the run is finished."""
        self.last.unlink(missing_ok=True)
        self.before.unlink(missing_ok=True)


def _migrated(
    model: dict[str, Any],
    optimizer: dict[int, Any],
    methods: dict[str, Any],
    history: list[Any],
    stopped: bool,
) -> dict[str, Any]:
    """The state of a single network in the form of today."""
    return {
        "networks": [model],
        "optimizers": [optimizer],
        "losses": {},
        "procedure": {},
        "methods": [methods],
        "history": history,
        "passes": [len(history)] * 2,
        "stopped": stopped,
    }
