"""Quantization on grids."""

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.kernel_arguments import contiguous, dense, mask_of, write_back
from noisyq_fast.backends.on_triton import launch
from noisyq_fast.backends.on_triton.grid_launches import (
    Row,
    for_each_channel,
    grid_kernels,
    mask_kernels,
    mask_of_row,
    quantize_alone,
    quantize_and_mask,
    quantize_masked,
    quantize_signed,
    row_of_codes,
    written,
)
from noisyq_fast.backends.reference import grids as reference
from noisyq_fast.backends.reference.levels import FLT_MIN
from noisyq_fast.backends.reference.masks import CLIPPED, NOTHING
from noisyq_fast.grid import SIGNED, Grid

operators = Operators()


# On the signed grid.


@operators.register
def fake_quantize(x: Tensor, qmax: int, axis: int | None) -> Tensor:
    (y,) = fake_quantize_many([x], [qmax], [axis])
    return y


@operators.register
def fake_quantize_many(
    tensors: list[Tensor], qmaxes: list[int], axes: list[int | None]
) -> list[Tensor]:
    rows = [Row(*dense(x), qmax, axis) for x, qmax, axis in zip(tensors, qmaxes, axes, strict=True)]
    quantize_signed(rows)
    return [row.y for row in rows if row.y is not None]


@operators.register
def fake_quantize_ema(
    x: Tensor,
    running_absmax: Tensor,
    observed: Tensor | None,
    qmax: int,
    axis: int | None,
    averaging_constant: float,
) -> Tensor:
    x, y = dense(x)
    running, weight = running_absmax.contiguous(), contiguous(observed)
    quantize_signed([Row(x, y, qmax, axis, running=running, observed=weight)], averaging_constant)
    write_back(running, running_absmax)
    write_back(weight, observed)
    return y


@operators.register
def fake_quantize_fixed_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize_fixed_range(x, absmax, SIGNED, qmax, axis)


@operators.register
def fake_quantize_fixed_range_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    x, y = dense(x)
    return y, quantize_masked(Row(x, y, qmax, axis), CLIPPED, absmax)


@operators.register
def zero_clipped(grad: Tensor, clipped: Tensor) -> Tensor:
    out = torch.empty_like(grad)
    launch.launch_map(mask_kernels().zero_clipped, grad, None, out, clipped.contiguous())
    return out


@operators.register
def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    x, codes = dense(x, torch.int8)
    scale = for_each_channel(x, axis, torch.float32)
    if x.numel() == 0:
        scale.fill_(FLT_MIN)
    quantize_signed([Row(x, codes, qmax, axis, scale=scale)])
    return codes, scale


@operators.register
def dequantize(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    return dequantize_on_grid(codes, scale, None, axis)


# On any grid.


@operators.register
def fake_quantize_on_grid(
    x: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor]:
    return _fake_quantize(x, grid, axis, masked)


@operators.register
def fake_quantize_ema_on_grid(
    x: Tensor,
    running_range: Tensor,
    observed: Tensor | None,
    grid: Grid,
    axis: int | None,
    averaging_constant: float,
    masked: str,
) -> tuple[Tensor, Tensor]:
    running, weight = running_range.contiguous(), contiguous(observed)
    outputs = _fake_quantize(x, grid, axis, masked, running, weight, averaging_constant)
    write_back(running, running_range)
    write_back(weight, observed)
    return outputs


@operators.register
def fake_quantize_fixed_range_on_grid(
    x: Tensor, range_: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor]:
    if masked == NOTHING:
        return _fake_quantize_fixed_range(x, range_, grid.kind, grid.qmax, axis), mask_of(x, masked)
    x, y = dense(x)
    return y, quantize_masked(Row(x, y, grid.qmax, axis, grid.kind), masked, range_)


@operators.register
def quantize_on_grid(x: Tensor, grid: Grid, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    row = row_of_codes(x, grid, axis)
    quantize_alone(row)
    return written(row)


@operators.register
def quantize_ema_on_grid(
    x: Tensor,
    running_range: Tensor,
    observed: Tensor | None,
    grid: Grid,
    axis: int | None,
    averaging_constant: float,
    masked: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    running, weight = running_range.contiguous(), contiguous(observed)
    row = row_of_codes(x, grid, axis)._replace(running=running, observed=weight)
    mask = quantize_and_mask(row, masked, averaging_constant)
    write_back(running, running_range)
    write_back(weight, observed)
    return *written(row), mask


@operators.register
def quantize_fixed_range_on_grid(
    x: Tensor, range_: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return reference.quantize_fixed_range_on_grid(x, range_, grid, axis, masked)
    row = row_of_codes(x, grid, axis)
    y = row.y if masked == NOTHING else None
    arguments = range_.contiguous(), y, row.scale, row.zero, float(row.qmax), row.kind
    launch.launch_map(grid_kernels().quantize_fixed_range, row.x, axis, *arguments)
    return *written(row), mask_of_row(row, masked)


@operators.register
def dequantize_on_grid(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None
) -> Tensor:
    codes, y = dense(codes, torch.float32)
    launch.launch_map(
        grid_kernels().dequantize, codes, axis, scale.contiguous(), contiguous(zero_point), y
    )
    return y


def _fake_quantize(
    x: Tensor,
    grid: Grid,
    axis: int | None,
    masked: str,
    running: Tensor | None = None,
    observed: Tensor | None = None,
    averaging_constant: float = 0.0,
) -> tuple[Tensor, Tensor]:
    x, y = dense(x)
    row = Row(x, y, grid.qmax, axis, grid.kind, running=running, observed=observed)
    if masked != NOTHING:
        scale, zero = (for_each_channel(x, axis, dtype) for dtype in (torch.float32, torch.uint8))
        row = row._replace(scale=scale, zero=zero)
    return y, quantize_and_mask(row, masked, averaging_constant)


def _fake_quantize_fixed_range(
    x: Tensor, range_: Tensor, kind: str, qmax: int, axis: int | None
) -> Tensor:
    x, y = dense(x)
    arguments = range_.contiguous(), y, None, None, float(qmax), kind
    launch.launch_map(grid_kernels().quantize_fixed_range, x, axis, *arguments)
    return y
