"""Folders of pictures that are numbered by their names."""

import os
import re
from pathlib import Path

import polars as pl

from experiments.data.au.faults import Faults

REPEATED = "repeated picture"
_SUFFIXES = (".jpg", ".jpeg", ".png")
_LONGEST = 18  # digits that fit 64 bits
_DIGITS = re.compile("[0-9]+")


def numbered(folder: Path, faults: Faults) -> pl.DataFrame:
    """`frame` Int64 and `picture`, the file's name, of the pictures in a folder.

    The number is the last one in the name, with any zeros before it; none of more than 18 digits
    counts. Of several pictures with one number, which are a fault, `picture` is null. What is no
    file, such as a folder, stands for a picture only where there is no other: reading it says so.
    """
    with os.scandir(folder) as entries:
        found = sorted((not entry.is_file(), entry.name) for entry in entries if _is_named(entry))
    pictures: dict[int, str | None] = {}
    for is_no_file, name in found:
        digits = _DIGITS.findall(Path(name).stem)
        if not digits or len(digits[-1].lstrip("0")) > _LONGEST:
            continue
        number = int(digits[-1])
        if number in pictures and is_no_file:
            continue
        if number in pictures:
            faults.add(REPEATED, folder / name, f"not the only picture of frame {number}")
            pictures[number] = None
        else:
            pictures[number] = name
    return pl.DataFrame(
        {"frame": list(pictures), "picture": list(pictures.values())},
        schema={"frame": pl.Int64, "picture": pl.String},
    )


def _is_named(entry: os.DirEntry) -> bool:
    """Whether it is named like a picture, and no broken link."""
    hidden = entry.name.startswith(".")
    fits = entry.name.lower().endswith(_SUFFIXES) and not hidden
    return fits and os.path.exists(entry.path)
