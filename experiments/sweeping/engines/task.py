"""One run of a sweep, as a process of its own."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from experiments.storage.identity import RunIdentity

_PR_SET_PDEATHSIG = 1
_PATIENCE = 10  # seconds to stop in order


@dataclass(frozen=True)
class Task:
    """A command line of run.py, and the folder in which that run writes."""

    arguments: tuple[str, ...]
    folder: Path
    epochs: int
    threads: int
    gpu: bool
    """Whether it takes a GPU where there is one."""
    script: Path
    directory: Path
    """Where the process runs: relative paths among the arguments start there."""
    identity: RunIdentity | None = field(compare=False, repr=False)
    """Tells whether the files in the folder are its own; None where nobody asks."""

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def open_log(self) -> TextIO:
        """The log, to add to it; an OSError names what is a link or a pipe instead."""
        log = self.directory / self.log
        log.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(log) and not stat.S_ISREG(log.lstat().st_mode):
            raise OSError(f"{log}: expected a regular file, got a directory, a link or the like")
        flags = os.O_NOFOLLOW | os.O_NONBLOCK
        return open(log, "a", opener=lambda path, mode: os.open(path, mode | flags, 0o644))

    def start(self) -> subprocess.Popen:
        """Starts the run; what it prints is added to its log.

        It is in a session of its own, so that Ctrl-C in a terminal reaches only who started it, and
        ends when that one is gone, however it went.
        """
        parent = os.getpid()
        prctl = ctypes.CDLL(None).prctl

        def end_with_parent() -> None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # gone already
                os._exit(1)

        command = [sys.executable, str(self.script), *self.arguments]
        with self.open_log() as output:
            output.write(f"$ {shlex.join(command)}\n")
            output.flush()
            return subprocess.Popen(
                command,
                cwd=self.directory,
                env=os.environ | {"OMP_NUM_THREADS": str(self.threads)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )


Ended = tuple[Task, int | OSError]
"""A task with its exit status, or with why it could not be started."""
Rounds = Generator[list[Ended], None, None]
"""Those that have ended since the round before."""


def stop(children: list[subprocess.Popen]) -> None:
    """Interrupts the processes, and kills those that do not end."""
    for child in children:
        child.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _PATIENCE
    for child in children:
        try:
            child.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
