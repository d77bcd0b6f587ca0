"""Quantization on grids (``csrc/cpu/quantize.cpp``)."""

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
    core,
    dense,
    mask_of,
    write_back,
)
from noisyq_fast.backends.native_cpu.threads import threads
from noisyq_fast.backends.reference.masks import CLIPPED, NOTHING
from noisyq_fast.grid import SIGNED, Grid

NO_AVERAGE = NULL, NULL, 0.0

operators = Operators()


# On the signed grid.


@operators.register
def fake_quantize(x: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize(x, SIGNED, qmax, axis)


@operators.register
def fake_quantize_many(
    tensors: list[Tensor], qmaxes: list[int], axes: list[int | None]
) -> list[Tensor]:
    return [fake_quantize(*arguments) for arguments in zip(tensors, qmaxes, axes, strict=True)]


@operators.register
def fake_quantize_ema(
    x: Tensor,
    running_absmax: Tensor,
    observed: Tensor | None,
    qmax: int,
    axis: int | None,
    averaging_constant: float,
) -> Tensor:
    return _fake_quantize_ema(x, running_absmax, observed, SIGNED, qmax, axis, averaging_constant)


@operators.register
def fake_quantize_fixed_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize_fixed_range(x, absmax, SIGNED, qmax, axis)


@operators.register
def fake_quantize_fixed_range_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    mask = mask_of(x, CLIPPED)
    return _fake_quantize_fixed_range(x, absmax, SIGNED, qmax, axis, CLIPPED, mask), mask


@operators.register
def zero_clipped(grad: Tensor, clipped: Tensor) -> Tensor:
    grad, out = dense(grad)
    clipped = clipped.contiguous()
    core.zero_clipped(
        DTYPE_CODES[grad.dtype],
        grad.data_ptr(),
        out.data_ptr(),
        clipped.data_ptr(),
        grad.numel(),
        threads(),
    )
    return out


@operators.register
def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    return _quantize(x, SIGNED, qmax, axis, torch.int8)


@operators.register
def dequantize(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    return dequantize_on_grid(codes, scale, None, axis)


# On any grid.


@operators.register
def fake_quantize_on_grid(
    x: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor]:
    mask = mask_of(x, masked)
    return _fake_quantize(x, grid.kind, grid.qmax, axis, NO_AVERAGE, masked, mask), mask


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
    mask = mask_of(x, masked)
    y = _fake_quantize_ema(
        x, running_range, observed, grid.kind, grid.qmax, axis, averaging_constant, masked, mask
    )
    return y, mask


@operators.register
def fake_quantize_fixed_range_on_grid(
    x: Tensor, range_: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor]:
    mask = mask_of(x, masked)
    y = _fake_quantize_fixed_range(x, range_, grid.kind, grid.qmax, axis, masked, mask)
    return y, mask


@operators.register
def quantize_on_grid(x: Tensor, grid: Grid, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    zero_point = _zero_point(x, axis)
    codes, scale = _quantize(x, grid.kind, grid.qmax, axis, grid.code_dtype, zero_point)
    return codes, scale, zero_point


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
    zero_point, mask = _zero_point(x, axis), mask_of(x, masked)
    written, weight = running_range.contiguous(), contiguous(observed)
    average = written.data_ptr(), address(weight), averaging_constant
    codes, scale = _quantize(
        x, grid.kind, grid.qmax, axis, grid.code_dtype, zero_point, average, masked, mask
    )
    write_back(written, running_range)
    write_back(weight, observed)
    return codes, scale, zero_point, mask


@operators.register
def quantize_fixed_range_on_grid(
    x: Tensor, range_: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, codes = dense(x, grid.code_dtype)
    range_ = range_.contiguous()
    layout = channel_layout(codes, axis)
    zero_point, mask = _zero_point(x, axis), mask_of(x, masked)
    scale = torch.empty_like(zero_point, dtype=torch.float32)
    core.quantize_fixed_range(
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        range_.data_ptr(),
        codes.data_ptr(),
        MASK_CODES[masked],
        address(mask),
        scale.data_ptr(),
        zero_point.data_ptr(),
        *layout,
        KIND_CODES[grid.kind],
        grid.qmax,
        threads(),
    )
    return codes, scale, zero_point, mask


@operators.register
def dequantize_on_grid(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None
) -> Tensor:
    codes, y = dense(codes, torch.float32)
    scale, zero_point = scale.contiguous(), contiguous(zero_point)
    core.dequantize(
        codes.data_ptr(),
        codes.dtype == torch.int8,
        scale.data_ptr(),
        address(zero_point),
        y.data_ptr(),
        *channel_layout(y, axis),
        threads(),
    )
    return y


def _zero_point(x: Tensor, axis: int | None) -> Tensor:
    return x.new_empty([] if axis is None else [x.shape[axis]], dtype=torch.uint8)


# Calls of the kernels. `mask` receives the bits.


def _fake_quantize(
    x: Tensor,
    kind: str,
    qmax: int,
    axis: int | None,
    average: tuple[int, int, float] = NO_AVERAGE,
    masked: str = NOTHING,
    mask: Tensor | None = None,
) -> Tensor:
    x, y = dense(x)
    if x is y and masked != NOTHING:
        y = torch.empty_like(x)  # the mask needs the original x
    core.fake_quantize(
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        y.data_ptr(),
        MASK_CODES[masked],
        address(mask),
        *channel_layout(y, axis),
        KIND_CODES[kind],
        qmax,
        *average,
        threads(),
    )
    return y


def _fake_quantize_ema(
    x: Tensor,
    running: Tensor,
    observed: Tensor | None,
    kind: str,
    qmax: int,
    axis: int | None,
    averaging_constant: float,
    masked: str = NOTHING,
    mask: Tensor | None = None,
) -> Tensor:
    written, weight = running.contiguous(), contiguous(observed)
    average = written.data_ptr(), address(weight), averaging_constant
    y = _fake_quantize(x, kind, qmax, axis, average, masked, mask)
    write_back(written, running)
    write_back(weight, observed)
    return y


def _fake_quantize_fixed_range(
    x: Tensor,
    range_: Tensor,
    kind: str,
    qmax: int,
    axis: int | None,
    masked: str = NOTHING,
    mask: Tensor | None = None,
) -> Tensor:
    x, y = dense(x)
    range_ = range_.contiguous()
    core.fake_quantize_fixed_range(
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        range_.data_ptr(),
        y.data_ptr(),
        MASK_CODES[masked],
        address(mask),
        *channel_layout(y, axis),
        KIND_CODES[kind],
        qmax,
        threads(),
    )
    return y


def _quantize(
    x: Tensor,
    kind: str,
    qmax: int,
    axis: int | None,
    dtype: torch.dtype,
    zero_point: Tensor | None = None,
    average: tuple[int, int, float] = NO_AVERAGE,
    masked: str = NOTHING,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    x, codes = dense(x, dtype)
    outer, channels, inner = channel_layout(codes, axis)
    scale = x.new_empty([] if axis is None else [channels], dtype=torch.float32)
    core.quantize(
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        codes.data_ptr(),
        MASK_CODES[masked],
        address(mask),
        scale.data_ptr(),
        address(zero_point),
        outer,
        channels,
        inner,
        KIND_CODES[kind],
        qmax,
        *average,
        threads(),
    )
    return codes, scale
