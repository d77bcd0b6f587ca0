"""Quantization on any grid (``csrc/cuda/grids.cu``)."""

from typing import Any

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.kernel_arguments import (
    DTYPE_CODES,
    KIND_CODES,
    MASK_CODES,
    NULL,
    address,
    channel_layout,
    contiguous,
    dense,
    mask_of,
    write_back,
)
from noisyq_fast.backends.native_cuda.blocks import progress
from noisyq_fast.backends.native_cuda.launch import Layout, blocks_of, launch, splits_of
from noisyq_fast.backends.reference.levels import FLT_MIN
from noisyq_fast.backends.reference.masks import NOTHING
from noisyq_fast.grid import Grid

Average = tuple[int, int, float]
NO_AVERAGE = NULL, NULL, 0.0

operators = Operators()


@operators.register
def fake_quantize_on_grid(
    x: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor]:
    return _fake_quantize_on_grid(x, grid, axis, masked, NO_AVERAGE)


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
    if x.numel() == 0:
        return _fake_quantize_on_grid(x, grid, axis, masked, NO_AVERAGE)
    running, weight = running_range.contiguous(), contiguous(observed)
    average = running.data_ptr(), address(weight), averaging_constant
    outputs = _fake_quantize_on_grid(x, grid, axis, masked, average)
    write_back(running, running_range)
    write_back(weight, observed)
    return outputs


@operators.register
def fake_quantize_fixed_range_on_grid(
    x: Tensor, range_: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor]:
    x, y = dense(x)
    mask = mask_of(x, masked)
    layout = channel_layout(y, axis)
    if layout[0] > 0:
        range_ = range_.contiguous()
        launch(
            "fake_quantize_fixed_range_on_grid",
            x,
            DTYPE_CODES[x.dtype],
            x.data_ptr(),
            range_.data_ptr(),
            y.data_ptr(),
            MASK_CODES[masked],
            mask.data_ptr(),
            *layout,
            blocks_of(x),
            KIND_CODES[grid.kind],
            grid.qmax,
        )
    return y, mask


@operators.register
def quantize_on_grid(x: Tensor, grid: Grid, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    x, codes = dense(x, grid.code_dtype)
    outer, channels, inner = layout = channel_layout(codes, axis)
    shape = [] if axis is None else [channels]
    if outer == 0:
        zeros = x.new_zeros(shape, dtype=torch.uint8)
        return codes, x.new_full(shape, FLT_MIN, dtype=torch.float32), zeros
    scale = x.new_empty(shape, dtype=torch.float32)
    zero_point = x.new_empty(shape, dtype=torch.uint8)
    sizes: tuple[Any, ...] = channels, inner
    scratch: tuple[Tensor, ...] = ()
    if outer == 1:
        kernel = "quantize_channels_on_grid"
    else:
        kernel, scratch = "quantize_on_grid", _range_scratch(x, layout)
        sizes = *layout, splits_of(x, layout)
    launch(
        kernel,
        x,
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        *sizes,
        *map(address, scratch),
        KIND_CODES[grid.kind],
        grid.qmax,
    )
    return codes, scale, zero_point


@operators.register
def dequantize_on_grid(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None
) -> Tensor:
    codes, y = dense(codes, torch.float32)
    layout = channel_layout(y, axis)
    scale, zero_point = scale.contiguous(), contiguous(zero_point)
    if layout[0] > 0:
        launch(
            "dequantize",
            codes,
            codes.data_ptr(),
            codes.dtype == torch.int8,
            scale.data_ptr(),
            address(zero_point),
            y.data_ptr(),
            *layout,
            splits_of(codes, layout)[1],
        )
    return y


def _fake_quantize_on_grid(
    x: Tensor, grid: Grid, axis: int | None, masked: str, average: Average
) -> tuple[Tensor, Tensor]:
    x, y = dense(x)
    mask = mask_of(x, masked)
    outer, channels, inner = layout = channel_layout(y, axis)
    if outer == 0:
        return y, mask
    # Channels that share a byte of the mask cannot have separate blocks.
    sizes: tuple[Any, ...] = channels, inner
    scratch: tuple[Tensor, ...] = ()
    kept: tuple[Any, ...] = average
    if outer == 1 and average == NO_AVERAGE and (masked == NOTHING or inner % 8 == 0):
        kernel, kept = "fake_quantize_channels_on_grid", ()
    else:
        kernel, scratch = "fake_quantize_on_grid", _range_scratch(x, layout)
        sizes = *layout, (splits_of(x, layout)[0], blocks_of(x))
    launch(
        kernel,
        x,
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        y.data_ptr(),
        MASK_CODES[masked],
        mask.data_ptr(),
        *sizes,
        *map(address, scratch),
        KIND_CODES[grid.kind],
        grid.qmax,
        *kept,
    )
    return y, mask


def _range_scratch(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Scratch for both ends of the range of each channel, and for the progress of blocks."""
    channels = layout[1]
    return x.new_empty(2 * channels, dtype=torch.float32), progress(x.device, 3 * channels)
