"""An index of the labelled frames of a data set."""

from __future__ import annotations

import hashlib
import itertools
import os
from pathlib import Path

import polars as pl

from experiments.data.au import alignment, pictures
from experiments.data.au.alignment import Crop
from experiments.data.au.faults import Faults
from experiments.data.au.labels import au_column
from experiments.data.au.release import Release, Sequence
from experiments.storage.files import kind

_VERSION = 2
"""To be raised when another index or other pixels come of the same files."""


def schema(release: Release) -> dict[str, type[pl.DataType]]:
    """The columns of an index. `picture` is relative to the data set's directory, `bytes` the
    size of the file; angle, x, y and side are a `Crop`, null for a picture without landmarks."""
    return {
        "subject": pl.String,
        "sequence": pl.String,
        "frame": pl.Int64,
        "picture": pl.String,
        "bytes": pl.Int64,
        **{au_column(au): pl.Int8 for au in release.aus},
        **dict.fromkeys(Crop._fields, pl.Float32),
    }


def fingerprint(release: Release, root: Path) -> str:
    """Changes with the names, sizes and times of label files, landmark files and picture folders.

    A folder's time changes when a picture is added, removed or renamed. What this cannot see is a
    picture written anew under its name, and a file whose size and time were kept.
    """
    digest = hashlib.sha256(f"{release.name} {_VERSION}\n".encode())
    for sequence in release.sequences(root):
        for path in (*sequence.labels, sequence.landmarks, sequence.images):
            digest.update(f"{path.relative_to(root).as_posix()} {_stamp(path)}\n".encode())
    return digest.hexdigest()


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def build(release: Release, root: Path) -> tuple[pl.DataFrame, Faults]:
    """Reads the labels of all frames that have a picture, ordered by subject, sequence, frame."""
    faults = Faults(root)
    columns = schema(release)
    found = [pl.DataFrame(schema=columns)]
    by_subject = itertools.groupby(release.sequences(root), lambda sequence: sequence.subject)
    for subject, group in by_subject:
        sequences = list(group)
        labelled = [any(map(os.path.lexists, sequence.labels)) for sequence in sequences]
        if not any(labelled):
            faults.add("missing subject", sequences[0].labels[0], f"{subject} has no labels")
            continue
        for sequence, has_labels in zip(sequences, labelled, strict=True):
            if not has_labels:
                faults.add("missing sequence", sequence.labels[0], "not there")
                continue
            frames = _frames(release, sequence, faults)
            if frames is not None:
                found.append(frames.select(*columns))
    return pl.concat(found), faults


def _frames(release: Release, sequence: Sequence, faults: Faults) -> pl.DataFrame | None:
    labels = release.read(sequence, faults)
    shown = None if labels is None else _shown(release, sequence, labels, faults)
    aligned = None if shown is None else _aligned(sequence, shown, faults)
    if aligned is None:
        return None
    frames = aligned.sort("frame")
    paths = [sequence.images / name for name in frames["picture"]]
    return frames.with_columns(
        subject=pl.lit(sequence.subject),
        sequence=pl.lit(sequence.name),
        picture=pl.Series([path.relative_to(faults.root).as_posix() for path in paths]),
        bytes=pl.Series([path.stat().st_size for path in paths], dtype=pl.Int64),
    )


def _shown(
    release: Release, sequence: Sequence, labels: pl.DataFrame, faults: Faults
) -> pl.DataFrame | None:
    """The labels of frames that have a picture, with its name."""
    if not sequence.images.is_dir():
        what = "no such folder"
        if sequence.images.exists():
            what = f"expected a folder, got {kind(sequence.images)}"
        faults.add("missing pictures", sequence.images, what)
        return None
    found = pictures.numbered(sequence.images, faults)
    early = found.filter(pl.col("frame") < release.first_frame)["frame"].to_list()
    if early:
        what = f"got a picture of frame {early[0]}, takes frames from {release.first_frame}"
        faults.add("wrong numbers", sequence.images, what)
        return None
    if not sequence.lacks_images:
        folder = sequence.images.relative_to(faults.root).as_posix()
        missing = labels.join(found, on="frame", how="anti")
        for line, frame in missing.select("line", "frame").iter_rows():
            what = f"frame {frame} has no picture in {folder}"
            faults.add("missing picture", sequence.labels[0], what, line)
    return labels.join(found.drop_nulls(), on="frame")


def _aligned(sequence: Sequence, shown: pl.DataFrame, faults: Faults) -> pl.DataFrame | None:
    """The frames that have landmarks, with their crops; all where there is no landmark file."""
    shown = shown.drop("line")
    if not os.path.lexists(sequence.landmarks):  # a broken link to them is a fault
        return shown.with_columns(pl.lit(None, pl.Float32).alias(name) for name in Crop._fields)
    crops = alignment.read_crops(sequence.landmarks, faults)
    if crops is None:
        return None
    for frame in shown.join(crops, on="frame", how="anti")["frame"]:
        faults.add("missing landmarks", sequence.landmarks, f"frame {frame} has none")
    aligned = shown.join(crops, on="frame")
    for line, frame in aligned.filter(pl.col("side").is_null()).select("line", "frame").iter_rows():
        what = f"frame {frame} has none of a face, or several"
        faults.add(alignment.MALFORMED, sequence.landmarks, what, line)
    return aligned.filter(pl.col("side").is_not_null())
