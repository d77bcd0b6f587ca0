"""Atomic writing of files."""

from __future__ import annotations

import os
from pathlib import Path


def checked(path: str | os.PathLike[str]) -> Path:
    """The path of a file to write; an OSError, before any work is done, if it cannot be written."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, takes the path of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it before")
    return path


def write(path: Path, blob: bytes) -> None:
    """Writes or replaces the file atomically: after an error an existing file is unchanged."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(blob)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
