"""Writing files so that nobody finds half of one."""

from __future__ import annotations

import os
from pathlib import Path


def checked(path: str | os.PathLike[str]) -> Path:
    """A place for a file; an OSError where there can be none, before work is done for it."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, takes the path of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it before")
    return path


def write(path: Path, blob: bytes) -> None:
    """Replaces the file if there is one. After an error it is as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(blob)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
