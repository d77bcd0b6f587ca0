"""What all commands share: how they print, how they end, and how they tell what went wrong."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO

import tyro

from experiments.reporting.escaping import one_line

FAILED = 1
"""Exit status: something went wrong on the way."""
REFUSED = 2
"""Exit status: nothing was begun, as an option is wrong or data cannot be read."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def run(main: Callable[[], int], interrupted: str) -> int:
    """The exit status of a command, which is given what terminals and pipes ask for; tells
    `interrupted` after Ctrl-C."""
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
    warnings.formatwarning = _warning
    if os.environ.get("NO_COLOR") or not (sys.stdout.isatty() and sys.stderr.isatty()):
        tyro._experimental_options["ansi_codes"] = False  # as tyro's documentation names it
    try:
        return main()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    finally:
        sys.stdout.flush()


def bars_off() -> bool | None:
    """What tqdm takes as `disable`: bars are for terminals that can write a line anew."""
    return True if os.environ.get("TERM") == "dumb" else None


def fail(error: Exception, status: int | None = None) -> int:
    """Tells the error in one line and gives the exit status. Without a given one it depends on what
    the error is about: if it begins with the name of an argument, that one is refused."""
    text = told(error)
    print(f"error: {text}", file=sys.stderr)
    if status is not None:
        return status
    return REFUSED if text.startswith(("--", "RUNS: ", "FOLDER: ")) else FAILED


def amount(count: int, noun: str) -> str:
    """A number of things, such as 1 run or 2,000 runs."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def told(error: Exception) -> str:
    """What an error says to a user. Of the operating system's, the file and what it is about it,
    without the number."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror[:1].lower() + error.strerror[1:]
        file = error.filename2 or error.filename  # the second is where something was to be moved
        text = reason if file is None else f"{file}: {reason}"
    return one_line(text or type(error).__name__)


_plain_warning = warnings.formatwarning


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning for users without the line of code that gave it; others are for developers."""
    if issubclass(category, UserWarning):
        return f"warning: {message}\n"
    return _plain_warning(message, category, filename, lineno, line)


class _Output:
    """Standard output or error. What is printed after its reader has gone, such as `head`, is
    dropped: a run that trains for hours is not lost for it."""

    def __init__(self, stream: TextIO | None) -> None:
        if stream is None:  # closed before the command began
            stream = open(os.devnull, "w")  # noqa: SIM115
        # A log file shows each line at once, and a terminal may not know every character.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        """Also what is in the buffer, and what comes from C++."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
