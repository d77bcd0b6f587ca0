"""DISFA: 27 people who watch a film, the intensities of 12 action units coded frame by frame.

Mavadati et al. 2013, "DISFA: A Spontaneous Facial Action Intensity Database",
doi:10.1109/T-AFFC.2013.4. Eight of the AUs are in use; one is positive from intensity 2 of 5 on.
"""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

from experiments.data.au import labels, loading
from experiments.data.au.faults import Faults
from experiments.data.au.frames import Frames
from experiments.data.au.release import Release, Sequence
from experiments.data.au.table import Table

AUS = (1, 2, 4, 6, 9, 12, 25, 26)
_NUMBERS = (
    (1, 2, 9, 10, 16, 26, 27, 30, 32),
    (6, 11, 12, 13, 18, 21, 24, 28, 31),
    (3, 4, 5, 7, 8, 17, 23, 25, 29),
)
PARTS = tuple(tuple(f"SN{number:03}" for number in part) for part in _NUMBERS)
"""Those of Luo et al. 2022, arXiv 2205.01782, and of most others; fold 1 tests on the third."""
_POSITIVE = 2
_LACKS_IMAGES = "SN021"


def load(data_dir: Path | None, image_size: int, strict: bool, cache_dir: Path | None) -> Frames:
    """Reads DISFA; `loading.load` says how.

    The video of SN021 is shorter than its labels: those without a picture are no faults.
    """
    return loading.load(_RELEASE, data_dir, image_size, strict, cache_dir)


def _sequences(root: Path) -> list[Sequence]:
    folder = root / "ActionUnit_Labels"
    return [
        Sequence(
            subject=subject,
            name="video",
            labels=tuple(folder / subject / f"{subject}_au{au}.txt" for au in AUS),
            images=root / "Images" / subject,
            landmarks=root / "Landmarks" / f"{subject}.csv",
            lacks_images=subject == _LACKS_IMAGES,
        )
        for subject in _RELEASE.subjects
    ]


def _read(sequence: Sequence, faults: Faults) -> pl.DataFrame | None:
    """Labels from a file for each AU, whose lines are a frame, counted from 1, and an intensity."""
    missing = [path for path in sequence.labels if not os.path.lexists(path)]
    for path in missing:
        faults.add("missing AU", path, "not there")
    if missing:
        return None
    tables = [
        Table.read(path, labels.MALFORMED, faults, header=("frame", "intensity"))
        for path in sequence.labels
    ]
    texts = [
        table.select({"frame": 0, labels.au_column(au): 1})
        for au, table in zip(AUS, tables, strict=True)
        if table is not None
    ]
    if len(texts) < len(tables):
        return None
    _compare_frames(texts, sequence.labels, faults)
    columns = [
        labels.checked(text, range(6), path, faults)
        for text, path in zip(texts, sequence.labels, strict=True)
    ]
    first, *others = columns
    for other in others:
        first = first.join(other.drop("line"), on="frame")
    aus = pl.exclude("line", "frame")
    return first.with_columns((aus >= _POSITIVE).cast(pl.Int8))


def _compare_frames(texts: list[pl.DataFrame], paths: tuple[Path, ...], faults: Faults) -> None:
    """Tells of the frames that only one of two files has: of the first one and each other."""
    number = pl.col("frame").cast(pl.Int64, strict=False)
    (first, *others) = (text.select("line", number).drop_nulls() for text in texts)
    for other, path in zip(others, paths[1:], strict=True):
        _tell_extra(first, paths[0], other, path, faults)
        _tell_extra(other, path, first, paths[0], faults)


def _tell_extra(
    here: pl.DataFrame, here_path: Path, there: pl.DataFrame, there_path: Path, faults: Faults
) -> None:
    extra = here.join(there, on="frame", how="anti")
    for line, frame in extra.iter_rows():
        faults.add("differing frames", here_path, f"{there_path.name} lacks frame {frame}", line)


_RELEASE = Release(
    name="disfa",
    aus=AUS,
    parts=PARTS,
    first_frame=1,
    tree="a directory with ActionUnit_Labels/SN001/SN001_au1.txt and Images/SN001/1.jpg, for each "
    "of the 27 subjects, and optionally OpenFace's Landmarks/SN001.csv; the pictures come out of "
    "the videos with `ffmpeg -i LeftVideoSN001_comp.avi -fps_mode passthrough -start_number 1 "
    "-q:v 2 Images/SN001/%d.jpg`",
    source="the University of Denver, http://mohammadmahoor.com/disfa",
    sequences=_sequences,
    read=_read,
)
