"""Passes over the sums of products (`sum_kernels`); without elements, by the reference."""

import struct
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.kernel_arguments import channels_last_rows, floats, like, write_back
from noisyq_fast.backends.on_triton import launch
from noisyq_fast.backends.on_triton.tiling import Tiling, fewer_splits
from noisyq_fast.backends.reference import sums as reference
from noisyq_fast.grid import ODD, Grid

operators = Operators()


@operators.register
def moments(sums: Tensor, bound: int) -> tuple[Tensor, ...]:
    if sums.numel() == 0:
        return reference.moments(sums, bound)
    sums, _, channels = channels_last_rows(sums)
    is_narrow = reference.is_narrow(bound)
    kept = sums
    if is_narrow and sums.dtype != torch.int16:
        kept = torch.empty_like(sums, dtype=torch.int16)
    tiling = _reduction_tiling(sums)
    wholes = sums.new_empty(3 * tiling.splits, channels, dtype=torch.int64)
    ends = sums.new_empty(2 * tiling.splits, channels, dtype=torch.float32)
    _launch(
        *(_kernels().moments_partially, tiling, sums, None if kept is sums else kept),
        *(wholes, ends, not is_narrow),
    )
    total, squares = (sums.new_empty(channels, *n, dtype=torch.int64) for n in ((), (2,)))
    low, high = sums.new_empty(2, channels, dtype=torch.float32).unbind()
    found = total, squares, low, high
    _finish(_kernels().moments, wholes, ends, *found, tiling.splits, channels=channels)
    return kept, *found


def moments_of_products(found: Tensor) -> tuple[Tensor, ...]:
    """The moments of each channel, from the ``found`` of a product."""
    channels = found.shape[1]
    total, squares = (found.new_empty(channels, *n) for n in ((), (2,)))
    low, high = found.new_empty(2, channels, dtype=torch.float32).unbind()
    tile = 128
    programs = -(-channels // tile)
    arguments = found, total, squares, low, high, channels, tile
    launch.launch(found, _kernels().moments_of_products, (programs,), 4, *arguments)
    return total, squares, low, high


@operators.register
def normalization(
    sum_: Tensor,
    squares: Tensor,
    count: int,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: reference.Running | None = None,
) -> tuple[Tensor, ...]:
    channels = len(sum_)
    found = (
        *scale.new_empty(4, channels).unbind(),
        *scale.new_empty(2, channels, dtype=torch.float64).unbind(),
    )
    tracked: Any = None
    moved: tuple[Tensor, ...] = ()
    if running is not None and running.is_plain():
        moved = running[:3]
        numbers = _bits(count / (count - 1)), 1 - running.momentum, running.momentum
        tracked = (*moved, floats(running.bias), *numbers)
    _finish(
        *(_kernels().normalization, sum_.contiguous(), squares.contiguous(), scale.contiguous()),
        *(floats(weight), floats(bias), *found, count, _bits(eps), tracked, bool(moved)),
        channels=channels,
    )
    for x in moved:
        write_back(x, x)
    if running is not None and not moved:
        *_, mean, variance = found
        reference.track(running, mean, variance, count)
    return found


@operators.register
def ends_of_line(low: Tensor, high: Tensor, factor: Tensor, term: Tensor, relu: bool) -> Tensor:
    range_ = factor.new_empty(2)
    of_channels = (x.contiguous() for x in (low, high, factor, term))
    _finish(_kernels().ends_of_line, *of_channels, range_, relu, len(low))
    return range_


@operators.register
def observe(
    ends: Tensor, running: Tensor, observed: Tensor, averaging_constant: float, grid: Grid
) -> Tensor:
    batch = ends if grid.is_affine else ends.new_empty(())
    average = running.contiguous()
    operands = ends, average, observed, batch, averaging_constant, grid.kind
    launch.launch(ends, _kernels().observe, (1,), 1, *operands, 1)
    write_back(average, running)
    write_back(observed, observed)
    return batch


@operators.register
def map_sums(
    sums: Tensor,
    factor: Tensor,
    term: Tensor,
    residual: Tensor | None,
    relu: bool,
    wants_zeros: bool,
    wants_range: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if sums.numel() == 0:
        return reference.map_sums(sums, factor, term, residual, relu, wants_zeros, wants_range)
    sums, _, channels = channels_last_rows(sums)
    y = torch.empty_like(sums, dtype=torch.float32)
    residual = None if residual is None else like(residual, sums)
    zeros = sums.new_empty((y.numel() + 7) // 8, dtype=torch.uint8) if wants_zeros else None
    tiling = launch.tiling_of_map(y, None)
    partial = sums.new_empty(2, tiling.splits, dtype=torch.int32) if wants_range else None
    range_ = sums.new_empty(2, dtype=torch.float32) if wants_range else None
    _launch(
        *(_kernels().map_sums, tiling, sums, factor.contiguous(), term.contiguous()),
        *(residual, y, zeros, partial, relu, channels),
    )
    if partial is not None:
        _finish(_kernels().ends_of_map, partial, range_, tiling.splits)
    return y, zeros, range_


@operators.register
def codes_of_sums(
    sums: Tensor, factor: Tensor, term: Tensor, relu: bool, range_: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    if sums.numel() == 0 or grid.kind == ODD:
        return reference.codes_of_sums(sums, factor, term, relu, range_, grid)
    sums, *_ = channels_last_rows(sums)
    codes = torch.empty_like(sums, dtype=grid.code_dtype)
    scale, zero = (sums.new_empty([], dtype=dtype) for dtype in (torch.float32, torch.uint8))
    _launch(
        *(_kernels().codes_of_sums, _tiling(sums), sums, factor.contiguous(), term.contiguous()),
        *(range_.contiguous(), codes, scale, zero, float(grid.qmax), grid.kind, relu),
    )
    return codes, scale, zero


@operators.register
def grads_of_norm(
    grad: Tensor,
    sums: Tensor,
    factor: Tensor,
    term: Tensor,
    relu: bool,
    mean: Tensor,
    inverse: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    uses_batch: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    of_channels = factor, term, mean, inverse, scale
    if sums.numel() == 0:
        return reference.grads_of_norm(
            grad, sums, factor, term, relu, *of_channels[2:], weight, uses_batch
        )
    factor, term, mean, inverse, scale = (x.contiguous() for x in of_channels)
    sums, rows, channels = channels_last_rows(sums)
    tiling = _reduction_tiling(sums)
    partial = sums.new_empty(2 * tiling.splits, channels, dtype=torch.float64)
    _launch(
        *(_kernels().grads_of_norm_partially, tiling, sums, like(grad, sums)),
        *(factor, term, mean, partial, relu),
    )
    of_batch = sums.new_empty(5, channels, dtype=torch.float32).unbind()
    slope, shift, tilt, of_weight, of_bias = of_batch
    _finish(
        *(_kernels().grads_of_norm, partial, inverse, scale, floats(weight)),
        *(*of_batch, rows, uses_batch, tiling.splits),
        channels=channels,
    )
    return (slope, shift, tilt), of_weight, of_bias


@operators.register
def grads_of_sums(
    grad: Tensor,
    sums: Tensor,
    factor: Tensor,
    term: Tensor,
    relu: bool,
    mean: Tensor,
    slope: Tensor,
    shift: Tensor,
    tilt: Tensor,
) -> Tensor:
    of_channels = factor, term, mean, slope, shift, tilt
    if sums.numel() == 0:
        return torch.empty_like(sums, dtype=grad.dtype)
    sums, *_ = channels_last_rows(sums)
    grad = like(grad, sums)
    out = torch.empty_like(grad)
    _launch(
        *(_kernels().grads_of_sums, _tiling(sums), sums, grad),
        *(*(x.contiguous() for x in of_channels), out, relu),
    )
    return out


def _tiling(sums: Tensor) -> Tiling:
    return launch.tiling_of_map(sums, 1)


def _reduction_tiling(sums: Tensor) -> Tiling:
    """A tiling with few programs, so that combining their partial results is quick."""
    return fewer_splits(_tiling(sums), launch.limits(sums.device))


def _bits(x: float) -> int:
    """The bits of a float64: Triton passes Python floats as float32."""
    (bits,) = struct.unpack("q", struct.pack("d", x))
    return bits


def _launch(kernel: object, tiling: Tiling, x: Tensor, *arguments: object) -> None:
    # 64-bit sums need many registers.
    launch.launch_tiled(kernel, tiling, x, *arguments, warps=2 * tiling.warps)


def _finish(kernel: object, x: Tensor, *arguments: object, channels: int | None = None) -> None:
    """Combines the partial results of the programs of a launch, each one value or one per
    channel."""
    if channels is None:
        launch.launch(x, kernel, (1,), 4, x, *arguments, 1024)
    else:
        programs = -(-channels // 16)
        launch.launch(x, kernel, (programs,), 4, x, *arguments, channels, (128, 16))


@cache
def _kernels() -> ModuleType:
    """Imported when first needed, like the others."""
    from noisyq_fast.backends.on_triton import sum_kernels

    return sum_kernels
