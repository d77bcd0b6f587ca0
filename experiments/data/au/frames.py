"""Frames of faces, labelled with action units: what all such data sets become."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

UNKNOWN = 9
"""The label of an action unit that its coder could not see, as in BP4D."""
PARTS = 3


@dataclass(frozen=True, eq=False)
class Frames:
    """`N` frames of `S` pixels by `S`, with labels of `T` action units (AUs).

    The subjects are divided into three parts, and a subject's frames are all in one of them.
    """

    name: str
    aus: tuple[int, ...]
    images: Tensor
    """uint8 `[M, S, S, 3]`, maybe a file mapped into memory: to be indexed, not to be copied."""
    row: Tensor
    """Which of `images` is the frame's, int64 `[N]`: there can be others."""
    given: Tensor
    """The annotators' labels: 0, 1 or `UNKNOWN`, int8 `[N, T]`."""
    truth: Tensor | None
    """The true labels 0 or 1, int8 `[N, T]`, where they are known."""
    subject: Tensor
    """Index into `subjects`, int64 `[N]`."""
    subjects: tuple[str, ...]
    part: Tensor
    """0, 1 or 2, int64 `[N]`."""
    checksum: str
    """Identifies pixels and labels, so that results tell which copy they come from."""
