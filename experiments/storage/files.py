"""Files that are written whole or not at all, and read if they are regular and not too large."""

import errno
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


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


REGULAR = "a regular file"
_KINDS = {
    stat.S_IFREG: REGULAR,
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Anything else, such as a FIFO, which would be waited for, is a ValueError that names the path;
    a file that is not there or cannot be opened is an OSError.
    """
    if kind(path) != REGULAR:  # asked before it is opened, which a device may act on
        raise ValueError(f"{path}: expected {REGULAR}, got {kind(path)}")
    with open(path, "rb", opener=without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: replaced while it was opened; try again")
        if status.st_size > limit:
            raise ValueError(f"{path}: got {status.st_size:,} bytes, takes at most {limit:,}")
        content = file.read(status.st_size + 1)
    if len(content) != status.st_size:
        raise ValueError(f"{path}: its size changed while it was read; try again")
    return content


def refuse_link(path: Path) -> None:
    """Raises a ValueError where a file that this project wrote is a link, to somebody else's."""
    if path.is_symlink():
        raise ValueError(f"{path}: expected {REGULAR}, got a symbolic link")


def kind(path: Path) -> str:
    """What is at the path, in words."""
    return _KINDS[stat.S_IFMT(path.stat().st_mode)]


def without_waiting(path: str, flags: int) -> int:
    """An opener for `open`: a FIFO that nobody reads is an OSError instead of a wait."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def open_lock(path: Path) -> IO[bytes]:
    """The file to lock, which is made if it is missing and keeps its content; an OSError names what
    is a link, a FIFO or the like instead."""
    try:
        file = open(path, "r+b", buffering=0, opener=_made_and_no_link)  # noqa: SIM115
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(f"{path}: expected {REGULAR}, got a symbolic link") from error
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path}: expected {REGULAR}, got {kind(path)}")
    return file


def _made_and_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
