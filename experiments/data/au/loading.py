"""Reads a data set of labelled videos."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import torch

from experiments.data.au import index_cache
from experiments.data.au.alignment import Crop
from experiments.data.au.decoded import Decoded, decoded
from experiments.data.au.faults import Faults
from experiments.data.au.frames import Frames
from experiments.data.au.labels import au_column
from experiments.data.au.release import Release
from experiments.data.au.summary import summary
from experiments.storage.files import atomic, open_lock

_FOLDER = "noisyq_fast"


def load(
    release: Release, data_dir: Path | None, image_size: int, strict: bool, cache_dir: Path | None
) -> Frames:
    """Reads the release in `data_dir`. A fault costs the frames that it is about, and no more.

    In `cache_dir`, or else in data_dir/noisyq_fast, are kept an index, the pictures decoded to
    `image_size` by `image_size` pixels, and all faults as faults.txt. What was found is printed.

    Raises FileNotFoundError where the data are not, OSError where the cache cannot be written, and
    ValueError where no frame is left or, if `strict`, where there is a fault.
    """
    root = _find(release, data_dir)
    cache = cache_dir or root / _FOLDER
    with _locked(cache):
        index = index_cache.load(release, root, cache)
        frames, faults = index.frames, index.faults
        _judge(frames, faults, strict, cache)
        columns = frames.select("picture", *Crop._fields)
        pictures = [(root / picture, _crop(*square)) for picture, *square in columns.iter_rows()]
        path = _pixels(release, index.fingerprint, image_size, cache)
        result = decoded(pictures, image_size, path)
        for row, why in sorted(result.unreadable.items()):
            faults.add("unreadable picture", pictures[row][0], why)
        frames = frames[result.readable]
        _judge(frames, faults, strict, cache)
    print(summary(release, frames))
    if faults.found:
        print(f"faults, all of them in {cache / 'faults.txt'}\n{faults.summary()}")
    return _frames(release, frames, result, image_size)


def _find(release: Release, data_dir: Path | None) -> Path:
    whence = f"takes {release.tree}. The data need a licence and come from {release.source}"
    if data_dir is None:
        raise FileNotFoundError(f"--data-dir: got none for {release.name}, {whence}")
    sequences = release.sequences(data_dir)
    if not any(os.path.lexists(path) for sequence in sequences for path in sequence.labels):
        raise FileNotFoundError(f"--data-dir: no labels of {release.name} in {data_dir}, {whence}")
    if not any(os.path.lexists(sequence.images) for sequence in sequences):
        raise FileNotFoundError(
            f"--data-dir: no pictures of {release.name} in {data_dir}, {whence}"
        )
    return data_dir


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Makes the directory, and keeps other processes out of it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = open_lock(cache / ".lock")
    except OSError as error:
        raise OSError(
            f"{cache}: the cache cannot be written there ({error.strerror or error}), "
            "say with --cache-dir where it can"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{cache}: waiting for another process that prepares the data")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _judge(frames: pl.DataFrame, faults: Faults, strict: bool, cache: Path) -> None:
    """Writes the faults down, and raises a ValueError where they leave no data to work with."""
    with atomic(cache / "faults.txt") as temporary:
        temporary.write_text(faults.text())
    if strict and faults.found:
        raise ValueError(f"{faults.root}: got {faults.first()}; --strict takes none")
    if not len(frames):
        raise ValueError(f"{faults.root}: no frame can be used, {faults.first()}")


def _crop(angle: float | None, *rest: float) -> Crop | None:
    return None if angle is None else Crop(angle, *rest)


def _pixels(release: Release, fingerprint: str, image_size: int, cache: Path) -> Path:
    """The file of decoded pictures; those of what the data set was before are removed."""
    prefix, mark = f"{release.name}-pictures-", fingerprint[:16]
    for path in cache.glob(f"{prefix}*"):
        if mark not in path.name:
            print(f"{path}: removed, as it is of other pictures than the data set has now")
            path.unlink()
    return cache / f"{prefix}{image_size}-{mark}.rgb"


def _frames(release: Release, frames: pl.DataFrame, result: Decoded, image_size: int) -> Frames:
    part_of = {subject: part for part, group in enumerate(release.parts) for subject in group}
    subjects = tuple(frames["subject"].unique().sort())
    number_of = {subject: number for number, subject in enumerate(subjects)}
    given = frames.select(au_column(au) for au in release.aus).to_numpy(order="c")
    # Not over the pixels, which would be read from the disk at every start: the index says which
    # pictures they come from, how large these files are and how they are cut.
    identity = f"{release.name} {image_size} {index_cache.digest(frames)}"
    return Frames(
        name=release.name,
        aus=release.aus,
        images=result.images,
        row=torch.from_numpy(result.readable),
        given=torch.from_numpy(given.copy()),
        truth=None,
        subject=torch.tensor([number_of[subject] for subject in frames["subject"]]),
        subjects=subjects,
        part=torch.tensor([part_of[subject] for subject in frames["subject"]]),
        checksum=hashlib.sha256(identity.encode()).hexdigest(),
    )
