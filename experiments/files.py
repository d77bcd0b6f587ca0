"""Files that are written whole or not at all, and read if they are regular and not too large."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path beside `path` that takes its place if the block succeeds and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def kind(path: Path) -> str:
    """What is at the path, in words."""
    return _KINDS[stat.S_IFMT(path.stat().st_mode)]


def without_waiting(path: str, flags: int) -> int:
    """An opener for `open`: a FIFO that nobody reads is an OSError instead of a wait."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)
