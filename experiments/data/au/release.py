"""What tells one data set of labelled videos from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from experiments.data.au.faults import Faults


@dataclass(frozen=True)
class Sequence:
    """The files of a video; not all of them need exist."""

    subject: str
    name: str
    labels: tuple[Path, ...]
    images: Path
    """A folder of pictures with the number of the frame in their names."""
    landmarks: Path
    lacks_images: bool = False
    """Whether labels without a picture are nothing new."""


@dataclass(frozen=True)
class Release:
    name: str
    aus: tuple[int, ...]
    parts: tuple[tuple[str, ...], ...]
    """The subjects of each part."""
    first_frame: int
    """Numbers below it show that the pictures are counted in another way than the labels."""
    tree: str
    """What its directory must hold, for a complaint."""
    source: str
    """Who gives the data away, and to whom."""
    sequences: Callable[[Path], list[Sequence]]
    """All that the release in a directory should have, those of a subject in a row."""
    read: Callable[[Sequence, Faults], pl.DataFrame | None]
    """The labels of a sequence: `line` in the first of its label files, `frame` Int64, and
    Int8 0, 1 or 9 for each AU; None where they cannot be read."""

    @property
    def subjects(self) -> tuple[str, ...]:
        return tuple(sorted(subject for part in self.parts for subject in part))
