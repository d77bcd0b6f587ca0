"""Draws the contact sheet: `python -m experiments.data.faces --out docs/faces.png`."""

from pathlib import Path

import tyro

from experiments.data.faces.contact_sheet import contact_sheet


def main(out: Path, subjects: int = 4, size: int = 64, enlarge: int = 2, seed: int = 0) -> None:
    """Draws the contact sheet of the action units.

    Args:
        out: The PNG file to write.
        subjects: Number of rows.
        size: Height and width of a face in pixels.
        enlarge: How many pixels of the sheet, across, a pixel of a face takes.
        seed: Chooses the faces.
    """
    sheet = contact_sheet(subjects, size, enlarge, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    tyro.cli(main)
