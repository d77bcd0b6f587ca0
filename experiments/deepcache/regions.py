"""Rectangles of a picture or of the output of a layer, and what becomes of them in the layers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

_MOST = 8
"""Rectangles that are followed: more save little and cost time in every layer."""


class Rectangle(NamedTuple):
    """With its last row and column."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def area(self) -> int:
        return max(0, self.right + 1 - self.left) * max(0, self.bottom + 1 - self.top)

    def within(self, other: Rectangle) -> Rectangle:
        """What they have in common; its area is 0 if nothing."""
        return Rectangle(
            max(self.left, other.left),
            max(self.top, other.top),
            min(self.right, other.right),
            min(self.bottom, other.bottom),
        )

    @property
    def slices(self) -> tuple[slice, slice]:
        """The rows and columns."""
        return slice(self.top, self.bottom + 1), slice(self.left, self.right + 1)

    def moved(self, offset: tuple[int, int]) -> Rectangle:
        """Down and right."""
        down, right = offset
        return Rectangle(self.left + right, self.top + down, self.right + right, self.bottom + down)


class Window(NamedTuple):
    """Of the inputs that an output of a convolution or pooling sees; each (vertical, horizontal).
    The size of the kernel is that with dilation."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def outputs(self, inputs: Rectangle) -> Rectangle:
        """Those that see nothing but these inputs."""
        (left, right), (top, bottom) = (
            (
                -(-(first + self.padding[axis]) // self.stride[axis]),
                (last + self.padding[axis] - self.kernel[axis] + 1) // self.stride[axis],
            )
            for axis, first, last in (
                (1, inputs.left, inputs.right),
                (0, inputs.top, inputs.bottom),
            )
        )
        return Rectangle(left, top, right, bottom)

    def inputs(self, outputs: Rectangle) -> Rectangle:
        """All that these outputs see, padding too."""
        (left, right), (top, bottom) = (
            (
                first * self.stride[axis] - self.padding[axis],
                last * self.stride[axis] - self.padding[axis] + self.kernel[axis] - 1,
            )
            for axis, first, last in (
                (1, outputs.left, outputs.right),
                (0, outputs.top, outputs.bottom),
            )
        )
        return Rectangle(left, top, right, bottom)


@dataclass(frozen=True)
class Reuse:
    """The part of a tensor `[..., H, W]` that was in the tensor of the frame before, at an offset
    (down, right). Rectangles may overlap."""

    size: tuple[int, int]
    offset: tuple[int, int]
    rectangles: tuple[Rectangle, ...]

    @classmethod
    def whole(cls, size: tuple[int, int]) -> Reuse:
        return cls(size, (0, 0), (_all_of(size),))

    @property
    def is_whole(self) -> bool:
        """Whether nothing changed at all."""
        return self.offset == (0, 0) and _all_of(self.size) in self.rectangles

    def through(self, window: Window, size: tuple[int, int]) -> Reuse | None:
        """What is left behind a layer whose output has a size; None where the offset falls between
        two of its outputs."""
        strides = window.stride
        if any(offset % stride for offset, stride in zip(self.offset, strides, strict=True)):
            return None
        found = [
            window.outputs(self._with_padding(rectangle, window)).within(_all_of(size))
            for rectangle in self.rectangles
        ]
        down, right = (o // s for o, s in zip(self.offset, strides, strict=True))
        kept = tuple(rectangle for rectangle in found if rectangle.area)
        return Reuse(size, (down, right), kept) if kept else None

    def _with_padding(self, rectangle: Rectangle, window: Window) -> Rectangle:
        """Padding is the same in every frame, where the frame has not moved."""
        (height, width), (down, right) = self.size, self.offset
        vertical, horizontal = window.padding
        left, top, last, bottom = rectangle
        if right == 0:
            left -= horizontal if left == 0 else 0
            last += horizontal if last == width - 1 else 0
        if down == 0:
            top -= vertical if top == 0 else 0
            bottom += vertical if bottom == height - 1 else 0
        return Rectangle(left, top, last, bottom)

    def and_(self, other: Reuse) -> Reuse | None:
        """What is reusable in both of two tensors of one size, such as the terms of a sum."""
        if (self.size, self.offset) != (other.size, other.offset):
            return None
        if self.rectangles == other.rectangles:
            return self
        pairs = {one.within(two) for one in self.rectangles for two in other.rectangles}
        kept = sorted((pair for pair in pairs if pair.area), key=lambda pair: -pair.area)[:_MOST]
        return Reuse(self.size, self.offset, tuple(kept)) if kept else None

    def rest(self) -> list[Rectangle]:
        """All outside of the rectangles, as rectangles that do not overlap: bands from one edge to
        the next, joined where they have the same columns."""
        height, width = self.size
        edges = {edge for r in self.rectangles for edge in (r.top, r.bottom + 1)}
        rows = sorted({0, height} | edges)
        done: list[Rectangle] = []
        above: list[Rectangle] = []
        for top, end in pairwise(rows):
            spans = sorted(
                (r.left, r.right) for r in self.rectangles if r.top <= top and end - 1 <= r.bottom
            )
            gaps, free = [], 0
            for left, right in [*spans, (width, width)]:
                if left > free:
                    gaps.append((free, left - 1))
                free = max(free, right + 1)
            joined = [r for r in above if (r.left, r.right) in gaps]
            tops = {(r.left, r.right): r.top for r in joined}
            done += [r for r in above if r not in joined]
            above = [Rectangle(g[0], tops.get(g, top), g[1], end - 1) for g in gaps]
        return done + above


def _all_of(size: tuple[int, int]) -> Rectangle:
    height, width = size
    return Rectangle(0, 0, width - 1, height - 1)


def of_blocks(blocks: Tensor, block: int) -> tuple[Rectangle, ...]:
    """Neighbouring blocks that are reusable, as up to 8 rectangles of pixels, which may overlap:
    each the one that adds most to those before, of several the largest."""
    new = blocks.cpu().numpy().copy()
    found = _maximal(new)
    chosen: list[Rectangle] = []
    while len(chosen) < _MOST and new.any():
        left, top, right, bottom = found.T
        sums = np.pad(new.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        added = (
            sums[bottom + 1, right + 1]
            - sums[top, right + 1]
            - sums[bottom + 1, left]
            + sums[top, left]
        )
        area = (right + 1 - left) * (bottom + 1 - top)
        best = Rectangle(*found[np.lexsort((area, added))[-1]].tolist())
        new[best.slices] = False
        chosen.append(best)
    return tuple(
        Rectangle(
            r.left * block, r.top * block, (r.right + 1) * block - 1, (r.bottom + 1) * block - 1
        )
        for r in chosen
    )


def _maximal(grid: np.ndarray) -> np.ndarray:
    """The rectangles of true cells that cannot be made wider, as tall as they are: a row each."""
    found = [np.empty((0, 4), dtype=np.int64)]
    for top in range(len(grid)):
        tall = np.logical_and.accumulate(grid[top:], axis=0)
        edges = np.diff(np.pad(tall, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        height, left = (edges == 1).nonzero()
        right = (edges == -1).nonzero()[1] - 1
        found.append(np.stack([left, np.full_like(left, top), right, top + height], 1))
    return np.concatenate(found)
