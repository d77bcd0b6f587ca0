"""The launches that quantize on grids (`grid_kernels`, `mask_kernels`)."""

from functools import cache
from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from noisyq_fast.backends.kernel_arguments import channel_layout, contiguous, dense, mask_of
from noisyq_fast.backends.on_triton import launch
from noisyq_fast.backends.on_triton.tiling import Tiling, absmax_tiling
from noisyq_fast.backends.reference.levels import FLT_MIN
from noisyq_fast.backends.reference.masks import NOTHING
from noisyq_fast.grid import AFFINE, SIGNED, Grid

# Their arguments take less than 4 KB, the limit of older drivers, and a kernel for them is compiled
# in seconds.
_TENSORS_PER_LAUNCH = 64


class Row(NamedTuple):
    """A tensor to quantize with its own range, into ``y``, and the further outputs to write."""

    x: Tensor
    y: Tensor | None
    qmax: int
    axis: int | None
    kind: str = SIGNED
    scale: Tensor | None = None
    zero: Tensor | None = None
    running: Tensor | None = None
    observed: Tensor | None = None

    @property
    def tiling(self) -> Tiling:
        layout = channel_layout(self.x, self.axis)
        return absmax_tiling(layout, self.x.element_size(), launch.limits(self.x.device))


def row_of_codes(x: Tensor, grid: Grid, axis: int | None) -> Row:
    """With empty outputs for codes, scales and zero points."""
    x, codes = dense(x, grid.code_dtype)
    scale, zero = (for_each_channel(x, axis, dtype) for dtype in (torch.float32, torch.uint8))
    if x.numel() == 0:
        scale.fill_(FLT_MIN)
        zero.zero_()
    return Row(x, codes, grid.qmax, axis, grid.kind, scale=scale, zero=zero)


def written(row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """The codes, their scales and their zero points."""
    assert row.y is not None
    assert row.scale is not None
    assert row.zero is not None
    return row.y, row.scale, row.zero


def quantize_and_mask(row: Row, masked: str, averaging_constant: float) -> Tensor:
    # Scales first: the bits of a mask are in memory order, in which channels may be interleaved.
    y = row.y if masked == NOTHING else None
    quantize_alone(row._replace(y=y), averaging_constant)
    return mask_of_row(row, masked)


def mask_of_row(row: Row, masked: str) -> Tensor:
    return mask_of(row.x, masked) if masked == NOTHING else quantize_masked(row, masked)


def quantize_signed(rows: list[Row], averaging_constant: float = 0.0) -> None:
    """On the signed grid: one launch for all tensors whose channels are not shared by programs, two
    launches for each other tensor."""
    together = []
    for row in rows:
        if row.x.numel() == 0:
            continue
        tiling = row.tiling
        if tiling.splits == 1:
            together.append((row, tiling))
        else:
            _quantize_shared(row, tiling, averaging_constant)
    for start in range(0, len(together), _TENSORS_PER_LAUNCH):
        _quantize_channels(together[start : start + _TENSORS_PER_LAUNCH], averaging_constant)


def quantize_alone(row: Row, averaging_constant: float = 0.0) -> None:
    """Quantizes on any grid."""
    if row.x.numel() == 0:
        return
    tiling = row.tiling
    if tiling.splits == 1:
        is_on_chip = tiling.tiles == 1
        arguments = _outputs(row, averaging_constant)
        launch.launch_tiled(grid_kernels().quantize_tensor, tiling, row.x, *arguments, is_on_chip)
    else:
        _quantize_shared(row, tiling, averaging_constant)


def _quantize_channels(together: list[tuple[Row, Tiling]], averaging_constant: float) -> None:
    rows, tilings = zip(*together, strict=True)
    *firsts, programs = accumulate((tiling.channel_tiles for tiling in tilings), initial=0)
    launch.launch(
        rows[0].x,
        grid_kernels().quantize_channels,
        (programs,),
        max(tiling.warps for tiling in tilings),
        tuple(row.x for row in rows),
        tuple(row.y for row in rows),
        tuple(row.scale for row in rows),
        tuple(row.running for row in rows),
        tuple(row.observed for row in rows),
        averaging_constant,
        tuple(float(row.qmax) for row in rows),
        tuple((*tiling.layout, first) for tiling, first in zip(tilings, firsts, strict=True)),
        tuple(tiling.tile for tiling in tilings),
        tuple(tiling.tiles == 1 for tiling in tilings),
    )


def _quantize_shared(row: Row, tiling: Tiling, averaging_constant: float) -> None:
    _, channels, _ = tiling.layout
    rows = tiling.splits * (2 if row.kind == AFFINE else 1)
    partial = torch.empty(rows, channels, dtype=torch.int32, device=row.x.device)
    launch.launch_tiled(grid_kernels().reduce_partially, tiling, row.x, partial, row.kind)
    arguments = partial, *_outputs(row, averaging_constant)
    launch.launch_tiled(grid_kernels().quantize_reduced, tiling, row.x, *arguments)


def _outputs(row: Row, averaging_constant: float) -> tuple:
    """The arguments of a kernel, from ``y`` to ``KIND``."""
    _, y, qmax, _, kind, *written = row
    return y, *written, averaging_constant, float(qmax), kind


def quantize_masked(row: Row, masked: str, range_: Tensor | None = None) -> Tensor:
    """The mask, from the range if one is given, else from the scale and the zero point."""
    x, y, qmax, axis, kind, scale, zero, *_ = row
    mask = mask_of(x, masked)
    if x.numel() > 0:
        _, channels, inner = channel_layout(x, axis)
        levels = contiguous(range_), scale, zero
        walk = channels, None if channels == 1 else inner
        arguments = *levels, y, mask, float(qmax), kind, masked, *walk
        tiling = launch.tiling_of_map(x, None)
        # With several channels, each element has its own levels in registers.
        warps = tiling.warps * (1 if channels == 1 else 2)
        launch.launch_tiled(mask_kernels().quantize_masked, tiling, x, *arguments, warps=warps)
    return mask


def for_each_channel(x: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty([] if axis is None else [x.shape[axis]], dtype=dtype)


@cache
def grid_kernels() -> ModuleType:
    """Imported when first needed: most processes that import the package have no GPU."""
    from noisyq_fast.backends.on_triton import grid_kernels

    return grid_kernels


@cache
def mask_kernels() -> ModuleType:
    from noisyq_fast.backends.on_triton import mask_kernels

    return mask_kernels
