"""Draws the contact sheet: `python -m experiments.data.faces docs/faces.png`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments import terminal
from experiments.checks import require_once, require_whole
from experiments.command_line import filled, paragraphs_of, parse_into
from experiments.data.faces.contact_sheet import contact_sheet


@dataclass(frozen=True)
class SheetConfig:
    """Draws a contact sheet of the action units: columns of expressions, rows of subjects.

    Exit status: 0 if it was written; 1 if it cannot be; 2 if an option is wrong; 130 after Ctrl-C;
    143 after SIGTERM, as of kill.
    """

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The PNG file to write."""

    subjects: int = 4
    """Number of rows."""

    size: int = 64
    """Height and width of a face in pixels."""

    enlarge: int = 2
    """How many pixels of the sheet, across, a pixel of a face takes."""

    seed: int = 0
    """Chooses the faces."""

    def __post_init__(self) -> None:
        if self.file.suffix.lower() != ".png":
            raise ValueError(f"FILE: got {self.file}, takes the name of a PNG file")
        for name, first, last in (
            ("subjects", 1, 100),
            ("size", 16, 256),
            ("enlarge", 1, 16),
            ("seed", 0, 2**63 - 1),
        ):
            require_whole(name, getattr(self, name), first, last)


def main() -> int:
    """Gives the exit status; what a user can mend is told in one line."""
    arguments = sys.argv[1:]
    try:
        require_once(arguments)
        takes = "the PNG file to write"
        about, prog = filled(paragraphs_of(SheetConfig)), "python -m experiments.data.faces"
        config = parse_into(SheetConfig, arguments, about, takes, prog)
    except ValueError as error:
        return terminal.fail(error, terminal.REFUSED)
    sheet = contact_sheet(config.subjects, config.size, config.enlarge, config.seed)
    try:
        config.file.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(config.file, optimize=True)
    except OSError as error:
        return terminal.fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(terminal.run(main, "interrupted"))
