"""Files that are written whole or not at all, and files that must not be somebody else's."""

import errno
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic(path: Path, before: Path | None = None) -> Iterator[Path]:
    """A path beside `path` that takes its place if the block succeeds and vanishes otherwise. What
    was there goes to `before`, if that is given.

    When this ends, the file is on the disk with its name: a power cut leaves the old one or the
    new one. An OSError says which file it is about.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # What a killed process of the same number left may be a link to anywhere.
        temporary.unlink(missing_ok=True)
        yield temporary
        _sync(temporary)
        if before and path.exists():
            path.replace(before)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, names: Collection[str]) -> None:
    """Removes what killed processes left of writing files of these names with `atomic`; nobody may
    be writing them now."""
    for path in folder.iterdir():
        name, _, process = path.name.removeprefix(".").rpartition(".")
        if path.name.startswith(".") and name in names and process.isdigit():
            with suppress(IsADirectoryError):
                path.unlink()


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def read_regular(path: Path) -> bytes:
    """The content of a file; an OSError names what is a link, a pipe or the like instead."""
    with _open(path, os.O_RDONLY, "rb") as file:
        return file.read()


def open_lock(path: Path) -> BinaryIO:
    """The file to lock, which is made if it is missing and keeps its content; an OSError names what
    is a link, a pipe or the like instead."""
    return _open(path, os.O_RDWR | os.O_CREAT, "r+b")


def _open(path: Path, flags: int, mode: str) -> BinaryIO:
    try:
        # Without waiting for who writes into a pipe.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(f"{path}: got a symbolic link, takes a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path}: got a folder, a pipe or a device, takes a regular file")
    return os.fdopen(descriptor, mode)
