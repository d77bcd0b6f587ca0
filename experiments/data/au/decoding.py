"""Decodes JPEG and PNG pictures in processes of their own."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from experiments.data.au.alignment import Crop, cut
from experiments.storage.files import read_bytes

_CHUNK = 32
_LARGEST = 64 << 20  # bytes of a picture's file
_MOST_PIXELS = 50_000_000  # of a picture; those of the releases have 1.4 million
_FORMATS = ("JPEG", "PNG")


class Job(NamedTuple):
    row: int
    picture: Path
    crop: Crop | None


def decode(jobs: list[Job], size: int, file: Path) -> Iterator[dict[int, str | None]]:
    """Writes each picture, uint8 `[size, size, 3]`, to its row of `file`.

    Gives, part by part, what is wrong with the picture of a row, or None for a row that is on the
    disk. A few pictures are decoded here, more by as many processes as there are cores.
    """
    chunks = [jobs[start : start + _CHUNK] for start in range(0, len(jobs), _CHUNK)]
    work = partial(_decode, size=size, file=file)
    if len(chunks) <= 1:
        yield from map(work, chunks)
        return
    workers = min(len(chunks), len(os.sched_getaffinity(0)))
    # Not forked, as a fork copies locks that other threads, such as PyTorch's, may hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        yield from pool.map(work, chunks)


def _end_with_parent() -> None:
    """Leaves an interrupt to the parent, and does not stay behind when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _decode(jobs: list[Job], size: int, file: Path) -> dict[int, str | None]:
    outcomes: dict[int, str | None] = {}
    with file.open("r+b") as pixels:
        for row, picture, crop in jobs:
            try:
                shown = _shown(picture, crop, size)
            except Exception as error:  # a malformed picture can raise almost anything
                outcomes[row] = str(error)
            else:
                pixels.seek(row * shown.nbytes)
                pixels.write(shown.data)
                outcomes[row] = None
        pixels.flush()
        os.fsync(pixels.fileno())
    return outcomes


def _shown(picture: Path, crop: Crop | None, size: int) -> np.ndarray:
    file = io.BytesIO(read_bytes(picture, _LARGEST))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=_FORMATS)
        except UnidentifiedImageError:
            takes = f"takes {' or '.join(_FORMATS)}"
            raise ValueError(f"cannot identify image file, {takes}") from None
    with image:
        if image.width * image.height > _MOST_PIXELS:
            got = f"{image.width} x {image.height} pixels"
            raise ValueError(f"got {got}, takes at most {_MOST_PIXELS:,}")
        return cut(image, crop, size)
