"""Quantization on the signed grid."""

from typing import Any

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.kernel_arguments import (
    DTYPE_CODES,
    NULL,
    address,
    channel_layout,
    contiguous,
    dense,
    mask_of,
    write_back,
)
from noisyq_fast.backends.native_cuda.blocks import progress
from noisyq_fast.backends.native_cuda.grids import dequantize_on_grid
from noisyq_fast.backends.native_cuda.launch import (
    Layout,
    blocks_of,
    launch,
    resident_blocks_of,
    splits_of,
)
from noisyq_fast.backends.reference.levels import FLT_MIN
from noisyq_fast.backends.reference.masks import CLIPPED

operators = Operators()


@operators.register
def fake_quantize(x: Tensor, qmax: int, axis: int | None) -> Tensor:
    (y,) = fake_quantize_many([x], [qmax], [axis])
    return y


@operators.register
def fake_quantize_many(
    tensors: list[Tensor], qmaxes: list[int], axes: list[int | None]
) -> list[Tensor]:
    outputs = []
    together: dict[torch.dtype, list[tuple]] = {}
    for x, qmax, axis in zip(tensors, qmaxes, axes, strict=True):
        x, y = dense(x)
        outputs.append(y)
        outer, channels, inner = layout = channel_layout(y, axis)
        if outer == 1:
            row = (x.data_ptr(), y.data_ptr(), NULL, channels, inner, qmax)
            # The input lives on in the row only as an address.
            together.setdefault(x.dtype, []).append((row, x))
        elif outer > 1:
            _fake_quantize_dynamic(x, y, layout, qmax, NULL, NULL, 0.0)
    for dtype, rows_and_inputs in together.items():
        rows, inputs = zip(*rows_and_inputs, strict=True)
        launch("fake_quantize_channels", inputs[0], DTYPE_CODES[dtype], list(rows))
    return outputs


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
    layout = channel_layout(y, axis)
    if layout[0] == 0:
        return y
    running, weight = running_absmax.contiguous(), contiguous(observed)
    addresses = running.data_ptr(), address(weight)
    _fake_quantize_dynamic(x, y, layout, qmax, *addresses, averaging_constant)
    write_back(running, running_absmax)
    write_back(weight, observed)
    return y


@operators.register
def fake_quantize_fixed_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    x, y = dense(x)
    layout = channel_layout(y, axis)
    if _is_mixed(x, layout):
        _fake_quantize_fixed_range_clipped(x, absmax, y, NULL, layout, qmax)
    elif layout[0] > 0:
        absmax = absmax.contiguous()
        launch(
            "fake_quantize_fixed_range",
            x,
            DTYPE_CODES[x.dtype],
            x.data_ptr(),
            absmax.data_ptr(),
            y.data_ptr(),
            *layout,
            splits_of(x, layout)[1],
            qmax,
        )
    return y


@operators.register
def fake_quantize_fixed_range_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    x, y = dense(x)
    clipped = mask_of(x, CLIPPED)
    layout = channel_layout(y, axis)
    if layout[0] > 0:
        _fake_quantize_fixed_range_clipped(x, absmax, y, clipped.data_ptr(), layout, qmax)
    return y, clipped


@operators.register
def zero_clipped(grad: Tensor, clipped: Tensor) -> Tensor:
    out = torch.empty_like(grad)
    clipped = clipped.contiguous()
    if grad.numel() > 0:
        launch(
            "zero_clipped",
            grad,
            DTYPE_CODES[grad.dtype],
            grad.data_ptr(),
            out.data_ptr(),
            clipped.data_ptr(),
            grad.numel(),
            blocks_of(grad),
        )
    return out


@operators.register
def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    x, codes = dense(x, torch.int8)
    outer, channels, inner = layout = channel_layout(codes, axis)
    shape = [] if axis is None else [channels]
    if outer == 0:
        return codes, x.new_full(shape, FLT_MIN, dtype=torch.float32)
    scale = x.new_empty(shape, dtype=torch.float32)
    if outer == 1:
        row = (x.data_ptr(), codes.data_ptr(), scale.data_ptr(), channels, inner, qmax)
        launch("quantize_channels", x, DTYPE_CODES[x.dtype], [row])
    else:
        splits, partial = _partial(x, layout)
        launch(
            "quantize_spread",
            x,
            DTYPE_CODES[x.dtype],
            x.data_ptr(),
            codes.data_ptr(),
            scale.data_ptr(),
            *layout,
            splits,
            partial.data_ptr(),
            qmax,
        )
    return codes, scale


@operators.register
def dequantize(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    return dequantize_on_grid(codes, scale, None, axis)


def _fake_quantize_dynamic(
    x: Tensor,
    y: Tensor,
    layout: Layout,
    qmax: int,
    running_absmax: int,
    observed: int,
    averaging_constant: float,
) -> None:
    """In one launch if the tensor is a single channel that fits on chip, else in two."""
    blocks = resident_blocks_of(x) if layout[1] == 1 else None
    sizes: tuple[Any, ...]
    if blocks is not None:
        shared = x.new_empty(blocks, dtype=torch.int32)
        kernel, sizes = "fake_quantize_resident", (x.numel(), blocks)
    elif _is_mixed(x, layout):
        shared = progress(x.device, layout[1] + 1)
        run = (1, 1, x.numel())
        kernel, sizes = "fake_quantize_mixed", (*layout, splits_of(x, run))
    else:
        splits, shared = _partial(x, layout)
        kernel, sizes = "fake_quantize_spread", (*layout, splits)
    launch(
        kernel,
        x,
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        y.data_ptr(),
        *sizes,
        shared.data_ptr(),
        qmax,
        running_absmax,
        observed,
        averaging_constant,
    )


def _fake_quantize_fixed_range_clipped(
    x: Tensor, absmax: Tensor, y: Tensor, clipped: int, layout: Layout, qmax: int
) -> None:
    absmax = absmax.contiguous()
    launch(
        "fake_quantize_fixed_range_clipped",
        x,
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        absmax.data_ptr(),
        y.data_ptr(),
        clipped,
        *layout,
        blocks_of(x),
        qmax,
    )


def _is_mixed(x: Tensor, layout: Layout) -> bool:
    """Whether accesses of 16 bytes would hold elements of several channels."""
    _, channels, inner = layout
    return channels > 1 and inner * x.element_size() % 16 != 0


def _partial(x: Tensor, layout: Layout) -> tuple[tuple[int, int], Tensor]:
    """The number of blocks that share a channel, and scratch for the absmax of each block."""
    splits = splits_of(x, layout)
    return splits, x.new_empty(layout[1] * splits[0], dtype=torch.int32)
