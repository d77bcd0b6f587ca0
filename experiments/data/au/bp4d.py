"""BP4D: 41 people in eight tasks each, labelled with 12 action units.

Zhang et al. 2014, "BP4D-Spontaneous: a high-resolution spontaneous 3D dynamic facial expression
database", doi:10.1016/j.imavis.2014.06.002. The release has 146,576 labelled frames in 328
sequences.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import polars as pl
import torch

from experiments.data.au import labels, loading
from experiments.data.au.faults import Faults
from experiments.data.au.frames import UNKNOWN, Frames
from experiments.data.au.frequency import frequency_weights
from experiments.data.au.release import Release, Sequence
from experiments.data.au.table import Table

AUS = (1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24)
# fmt: off
PARTS = (
    ("F001", "F002", "F008", "F009", "F010", "F016", "F018", "F023", "M001", "M004", "M007", "M008",
     "M012", "M014"),
    ("F003", "F005", "F011", "F013", "F020", "F022", "M002", "M005", "M010", "M011", "M013", "M016",
     "M017", "M018"),
    ("F004", "F006", "F007", "F012", "F014", "F015", "F017", "F019", "F021", "M003", "M006", "M009",
     "M015"),
)
"""Those of Luo et al. 2022, arXiv 2205.01782, and of most others; fold 1 tests on the third."""
WEIGHTS = (
    1.3451, 1.6916, 1.2479, 0.5613, 0.43292, 0.43562, 0.457, 0.54098, 1.4068, 0.7221, 1.4918, 1.667
)
# fmt: on
"""The frequency weights of the first two parts of the release."""
_TASKS = tuple(f"T{number}" for number in range(1, 9))
_TOLERANCE = 0.02


def load(data_dir: Path | None, image_size: int, strict: bool, cache_dir: Path | None) -> Frames:
    """Reads BP4D; `loading.load` says how.

    Warns if the frequency weights of the first two parts are more than 2 % away from those of the
    release: then it is a subset or something else.
    """
    frames = loading.load(_RELEASE, data_dir, image_size, strict, cache_dir)
    _compare_weights(frames)
    return frames


def _sequences(root: Path) -> list[Sequence]:
    coding, recordings = root / "AUCoding", root / "Sequences(2D+3D)"
    occurrence = coding / "AU_OCC"
    labels = occurrence if occurrence.is_dir() else coding
    images = recordings if recordings.is_dir() else root
    return [
        Sequence(
            subject=subject,
            name=task,
            labels=(labels / f"{subject}_{task}.csv",),
            images=images / subject / task,
            landmarks=root / "Landmarks" / f"{subject}_{task}.csv",
        )
        for subject in _RELEASE.subjects
        for task in _TASKS
    ]


def _read(sequence: Sequence, faults: Faults) -> pl.DataFrame | None:
    """Labels from a CSV file: a column for each AU, under its number, and the frame in the first.

    There are more AUs than the 12, and their order differs from copy to copy.
    """
    (path,) = sequence.labels
    table = Table.read(path, labels.MALFORMED, faults)
    if table is None:
        return None
    header = ["frame", *table.header[1:]]
    counts = {au: header.count(str(au)) for au in AUS}
    wrong = [f"{count} of AU {au}" for au, count in counts.items() if count != 1]
    if wrong:
        what = f"got {', '.join(wrong)} in the header, takes one column of each AU"
        faults.add("missing AU", path, what)
        return None
    positions = {labels.au_column(au): header.index(str(au)) for au in AUS}
    return labels.checked(table.select({"frame": 0, **positions}), (0, 1, UNKNOWN), path, faults)


def _compare_weights(frames: Frames) -> None:
    given = frames.given[frames.part < 2]
    if not len(given):
        return
    weights = frequency_weights(given)
    expected = torch.tensor(WEIGHTS)
    away = (weights / expected - 1).abs() > _TOLERANCE
    if away.any():
        aus = [f"{au}" for au, far in zip(AUS, away, strict=True) if far]
        warnings.warn(
            f"not all of BP4D's release: the frequency weights of parts 1 and 2 are more than "
            f"{_TOLERANCE:.0%} away from those of the release for AU {', '.join(aus)}",
            stacklevel=3,
        )


_RELEASE = Release(
    name="bp4d",
    aus=AUS,
    parts=PARTS,
    first_frame=0,
    tree="a directory with AUCoding/AU_OCC/F001_T1.csv and Sequences(2D+3D)/F001/T1/2440.jpg "
    "(AU_OCC and Sequences(2D+3D) may be left out) for each of the 41 subjects and T1 to T8, and "
    "optionally OpenFace's Landmarks/F001_T1.csv",
    source="the Binghamton University, https://www.cs.binghamton.edu/~lijun/Research/3DFE/"
    "3DFE_Analysis.html",
    sequences=_sequences,
    read=_read,
)
