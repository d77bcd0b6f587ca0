"""Decodes pictures in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from experiments.data.au.alignment import Crop, cut

_CHUNK = 32


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
    multiprocessing.parent_process().join()
    os._exit(1)


def _decode(jobs: list[Job], size: int, file: Path) -> dict[int, str | None]:
    outcomes = {}
    with file.open("r+b") as pixels:
        for row, picture, crop in jobs:
            try:
                with Image.open(picture) as image:
                    shown = cut(image, crop, size)
            except Exception as error:  # a malformed picture can raise almost anything
                outcomes[row] = str(error)
            else:
                pixels.seek(row * shown.nbytes)
                pixels.write(shown)
                outcomes[row] = None
        pixels.flush()
        os.fsync(pixels.fileno())
    return outcomes
