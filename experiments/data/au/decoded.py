"""Decoded pictures, in a file that is mapped into memory."""

from __future__ import annotations

import errno
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.data.au.alignment import Crop
from experiments.data.au.decoding import Job, decode
from experiments.storage.files import atomic, read_bytes
from experiments.terminal import bars_off

_TO_DO, _DONE = 0, 1


@dataclass(frozen=True, eq=False)
class Decoded:
    images: Tensor
    """Of each picture, uint8 `[M, S, S, 3]`, mapped; writing to it is not allowed."""
    readable: np.ndarray
    """Which of them could be read, int64, ascending."""
    unreadable: dict[int, str]
    """What is wrong with the others."""


def decoded(pictures: list[tuple[Path, Crop | None]], size: int, path: Path) -> Decoded:
    """Decodes the pictures that `path` has not got yet, and maps them.

    `path` has a row for each picture, and a file beside it a byte that says whether the row is
    done. That is written after the row, so that a process that is killed loses little. Pictures
    that cannot be read are tried again at every start, as they may have been replaced. A row that
    is done stays, so that other processes can have it mapped meanwhile.
    """
    count, stride = len(pictures), size * size * 3
    state = _open(path, count, stride)
    todo = [
        Job(row, picture, crop)
        for row, (picture, crop) in enumerate(pictures)
        if state[row] == _TO_DO
    ]
    _require_space(path, len(todo) * stride)
    unreadable: dict[int, str] = {}
    try:
        hidden = bars_off() if todo else True
        with tqdm(total=count, initial=count - len(todo), unit="picture", disable=hidden) as bar:
            for outcomes in decode(todo, size, path):
                unreadable |= {row: why for row, why in outcomes.items() if why is not None}
                state[[row for row, why in outcomes.items() if why is None]] = _DONE
                state.flush()
                bar.update(len(outcomes))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_space(path, len(todo) * stride) from error
        raise
    readable = np.flatnonzero(state == _DONE)
    return Decoded(_mapped(path, (count, size, size, 3)), readable, unreadable)


def _open(path: Path, count: int, stride: int) -> np.memmap:
    """The state, uint8 `[count]`, of the file at `path`, which is begun unless it is there."""
    state = path.with_suffix(".state")
    if not _is_whole(path, state, count, stride):
        if state.exists():
            print(f"{path}: damaged, so the pictures are decoded anew")
        state.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            file.truncate(count * stride)
        with atomic(state) as temporary:
            temporary.write_bytes(bytes([_TO_DO]) * count)
    return np.memmap(state, np.uint8, "r+", shape=count)


def _is_whole(path: Path, state: Path, count: int, stride: int) -> bool:
    if not (path.is_file() and path.stat().st_size == count * stride):
        return False
    try:
        rows = read_bytes(state, count)
    except (OSError, ValueError):
        return False
    return len(rows) == count and set(rows) <= {_TO_DO, _DONE}


def _require_space(path: Path, needed: int) -> None:
    if needed > shutil.disk_usage(path.parent).free:
        raise _no_space(path, needed)


def _no_space(path: Path, needed: int) -> OSError:
    free = shutil.disk_usage(path.parent).free
    return OSError(
        f"{path.parent}: {free:,} bytes are free, and the decoded pictures take {needed:,}; "
        "say with --cache-dir where there are"
    )


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    pixels = np.memmap(path, np.uint8, "r", shape=shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(pixels)
