"""The native kernels for CUDA (``csrc/cuda``), called with addresses, sizes and a stream.

Nothing here waits for the device, and nothing is allocated but outputs and, for activations, a few
kilobytes of maxima or ranges.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Backend
from noisyq_fast.backends.cuda_launch import (
    DeviceLimits,
    progress,
    resident_blocks,
    splits_of_map,
    splits_of_reduction,
)
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
    launch_failed,
    like,
    mask_of,
    missing,
    write_back,
)
from noisyq_fast.backends.reference import CLIPPED, FLT_MIN, NOTHING
from noisyq_fast.grid import Grid
from noisyq_fast.rules import CHUNK, NAMES, Rule

Layout = tuple[int, int, int]
Average = tuple[int, int, float]
NO_AVERAGE = NULL, NULL, 0.0

kernels: Any = getattr(core, "cuda", None)


@cache
def unavailable() -> str | None:
    if missing is not None:
        return missing
    if kernels is None:
        return f"the native library has no CUDA kernels: {core.cuda_compiler}"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    try:
        kernels.device_count()
    except RuntimeError as error:
        return f"kernels compiled by {core.cuda_compiler} do not run with this driver: {error}"
    return None


backend = Backend("cuda", device_types=("cuda",), unavailable=unavailable)


# On the signed grid.


@backend.register
def fake_quantize(x: Tensor, qmax: int, axis: int | None) -> Tensor:
    (y,) = fake_quantize_many([x], [qmax], [axis])
    return y


@backend.register
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
        _launch(kernels.fake_quantize_channels, inputs[0], DTYPE_CODES[dtype], list(rows))
    return outputs


@backend.register
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


@backend.register
def fake_quantize_fixed_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    x, y = dense(x)
    layout = channel_layout(y, axis)
    if _is_mixed(x, layout):
        _fake_quantize_fixed_range_clipped(x, absmax, y, NULL, layout, qmax)
    elif layout[0] > 0:
        absmax = absmax.contiguous()
        _launch(
            kernels.fake_quantize_fixed_range,
            x,
            DTYPE_CODES[x.dtype],
            x.data_ptr(),
            absmax.data_ptr(),
            y.data_ptr(),
            *layout,
            _splits(x, layout)[1],
            qmax,
        )
    return y


@backend.register
def fake_quantize_fixed_range_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    x, y = dense(x)
    clipped = mask_of(x, CLIPPED)
    layout = channel_layout(y, axis)
    if layout[0] > 0:
        _fake_quantize_fixed_range_clipped(x, absmax, y, clipped.data_ptr(), layout, qmax)
    return y, clipped


@backend.register
def zero_clipped(grad: Tensor, clipped: Tensor) -> Tensor:
    out = torch.empty_like(grad)
    clipped = clipped.contiguous()
    if grad.numel() > 0:
        _launch(
            kernels.zero_clipped,
            grad,
            DTYPE_CODES[grad.dtype],
            grad.data_ptr(),
            out.data_ptr(),
            clipped.data_ptr(),
            grad.numel(),
            _blocks(grad),
        )
    return out


@backend.register
def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    x, codes = dense(x, torch.int8)
    outer, channels, inner = layout = channel_layout(codes, axis)
    shape = [] if axis is None else [channels]
    if outer == 0:
        return codes, x.new_full(shape, FLT_MIN, dtype=torch.float32)
    scale = x.new_empty(shape, dtype=torch.float32)
    if outer == 1:
        row = (x.data_ptr(), codes.data_ptr(), scale.data_ptr(), channels, inner, qmax)
        _launch(kernels.quantize_channels, x, DTYPE_CODES[x.dtype], [row])
    else:
        splits, partial = _partial(x, layout)
        _launch(
            kernels.quantize_spread,
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


@backend.register
def dequantize(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    return dequantize_on_grid(codes, scale, None, axis)


# On any grid.


@backend.register
def fake_quantize_on_grid(
    x: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor]:
    return _fake_quantize_on_grid(x, grid, axis, masked, NO_AVERAGE)


@backend.register
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


@backend.register
def fake_quantize_fixed_range_on_grid(
    x: Tensor, range_: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor]:
    x, y = dense(x)
    mask = mask_of(x, masked)
    layout = channel_layout(y, axis)
    if layout[0] > 0:
        range_ = range_.contiguous()
        _launch(
            kernels.fake_quantize_fixed_range_on_grid,
            x,
            DTYPE_CODES[x.dtype],
            x.data_ptr(),
            range_.data_ptr(),
            y.data_ptr(),
            MASK_CODES[masked],
            mask.data_ptr(),
            *layout,
            _blocks(x),
            KIND_CODES[grid.kind],
            grid.qmax,
        )
    return y, mask


@backend.register
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
        kernel = kernels.quantize_channels_on_grid
    else:
        kernel, scratch = kernels.quantize_on_grid, _range_scratch(x, layout)
        sizes = *layout, _splits(x, layout)
    _launch(
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


@backend.register
def dequantize_on_grid(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None
) -> Tensor:
    codes, y = dense(codes, torch.float32)
    layout = channel_layout(y, axis)
    scale, zero_point = scale.contiguous(), contiguous(zero_point)
    if layout[0] > 0:
        _launch(
            kernels.dequantize,
            codes,
            codes.data_ptr(),
            codes.dtype == torch.int8,
            scale.data_ptr(),
            address(zero_point),
            y.data_ptr(),
            *layout,
            _splits(codes, layout)[1],
        )
    return y


# Of quantizers that learn.


@backend.register
def fake_quantize_learned(x: Tensor, parameters: Tensor, rule: Rule, axis: int | None) -> Tensor:
    x, y = dense(x)
    _map_learned(kernels.fake_quantize_learned, x, parameters, y, rule, axis)
    return y


@backend.register
def quantize_learned(x: Tensor, parameters: Tensor, rule: Rule, axis: int | None) -> Tensor:
    x, codes = dense(x, torch.int16)
    _map_learned(kernels.quantize_learned, x, parameters, codes, rule, axis)
    return codes


@backend.register
def fake_quantize_learned_backward(
    grad: Tensor,
    x: Tensor,
    parameters: Tensor,
    rule: Rule,
    axis: int | None,
    gradient_scale: float,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(parameters)
    x, grad = like(x, dx), like(grad, dx)
    outer, channels, inner = channel_layout(dx, axis)
    arguments = parameters.contiguous(), rule, channels, gradient_scale
    if (outer == 1 or channels == 1) and grad.dtype == x.dtype:
        return dx, _learned_backward(grad, x, dx, *arguments)
    # Channels that are spread, and gradients of another dtype, are rare: they are copied.
    memory = (outer, channels, inner), (channels * inner, inner, 1)
    x, grad = (t.as_strided(*memory).transpose(0, 1).float().contiguous() for t in (x, grad))
    of_channels = torch.empty_like(x)
    sums = _learned_backward(grad, x, of_channels, *arguments)
    dx.as_strided(*memory).transpose(0, 1).copy_(of_channels)
    return dx, sums


# Calls of the kernels.


def _map_learned(
    kernel: Callable, x: Tensor, parameters: Tensor, y: Tensor, rule: Rule, axis: int | None
) -> None:
    layout = channel_layout(y, axis)
    if layout[0] > 0:
        parameters = parameters.contiguous()
        _launch(
            kernel,
            x,
            DTYPE_CODES[x.dtype],
            x.data_ptr(),
            parameters.data_ptr(),
            y.data_ptr(),
            *layout,
            _splits(x, layout)[1],
            *_rule_arguments(rule),
        )


def _learned_backward(
    grad: Tensor,
    x: Tensor,
    dx: Tensor,
    parameters: Tensor,
    rule: Rule,
    channels: int,
    gradient_scale: float,
) -> Tensor:
    """Of contiguous channels: writes ``dx``, and returns the gradient of the parameters."""
    size = x.numel() // channels
    sums = torch.empty_like(parameters)
    partial = parameters.new_empty(sums.numel() * _partial_sums(size))
    _launch(
        kernels.fake_quantize_learned_backward,
        x,
        DTYPE_CODES[x.dtype],
        grad.data_ptr(),
        x.data_ptr(),
        parameters.data_ptr(),
        dx.data_ptr(),
        sums.data_ptr(),
        partial.data_ptr(),
        channels,
        size,
        *_rule_arguments(rule),
        gradient_scale,
    )
    return sums


def _rule_arguments(rule: Rule) -> tuple[int, int, int]:
    return NAMES.index(rule.name), rule.low, rule.high


def _partial_sums(size: int) -> int:
    """How many sums of chunks there are before the last, of a channel of ``size`` elements."""
    chunks = -(-size // CHUNK)
    return 0 if chunks <= 1 else chunks + _partial_sums(chunks)


def _fake_quantize_on_grid(
    x: Tensor, grid: Grid, axis: int | None, masked: str, average: Average
) -> tuple[Tensor, Tensor]:
    x, y = dense(x)
    mask = mask_of(x, masked)
    outer, channels, inner = layout = channel_layout(y, axis)
    if outer == 0:
        return y, mask
    # Channels that share a byte of the mask are not for blocks of their own.
    sizes: tuple[Any, ...] = channels, inner
    scratch: tuple[Tensor, ...] = ()
    kept: tuple[Any, ...] = average
    if outer == 1 and average == NO_AVERAGE and (masked == NOTHING or inner % 8 == 0):
        kernel, kept = kernels.fake_quantize_channels_on_grid, ()
    else:
        kernel, scratch = kernels.fake_quantize_on_grid, _range_scratch(x, layout)
        sizes = *layout, (_splits(x, layout)[0], _blocks(x))
    _launch(
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
    """For both ends of the range of each channel, and for what blocks find of them."""
    channels = layout[1]
    return x.new_empty(2 * channels, dtype=torch.float32), progress(x.device, 3 * channels)


def _fake_quantize_dynamic(
    x: Tensor,
    y: Tensor,
    layout: Layout,
    qmax: int,
    running_absmax: int,
    observed: int,
    averaging_constant: float,
) -> None:
    """In one launch where the tensor is a single channel that fits on chip, or in two."""
    blocks = resident_blocks(x.nbytes, _limits(x.device)) if layout[1] == 1 else None
    sizes: tuple[Any, ...]
    if blocks is not None:
        shared = x.new_empty(blocks, dtype=torch.int32)
        kernel, sizes = kernels.fake_quantize_resident, (x.numel(), blocks)
    elif _is_mixed(x, layout):
        shared = progress(x.device, layout[1] + 1)
        run = (1, 1, x.numel())
        kernel, sizes = kernels.fake_quantize_mixed, (*layout, _splits(x, run))
    else:
        splits, shared = _partial(x, layout)
        kernel, sizes = kernels.fake_quantize_spread, (*layout, splits)
    _launch(
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
    _launch(
        kernels.fake_quantize_fixed_range_clipped,
        x,
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        absmax.data_ptr(),
        y.data_ptr(),
        clipped,
        *layout,
        _blocks(x),
        qmax,
    )


def _is_mixed(x: Tensor, layout: Layout) -> bool:
    """Whether accesses of 16 bytes would hold elements of several channels."""
    _, channels, inner = layout
    return channels > 1 and inner * x.element_size() % 16 != 0


def _launch(kernel: Callable, x: Tensor, *arguments: object) -> None:
    """On the device of ``x`` and its current stream."""
    with torch.cuda.device_of(x):
        try:
            kernel(*arguments, _stream(x.device))
        except RuntimeError as error:
            raise launch_failed(kernel.__name__, x, error) from None


def _partial(x: Tensor, layout: Layout) -> tuple[tuple[int, int], Tensor]:
    """How many blocks share a channel, and room for the absmax of each block."""
    splits = _splits(x, layout)
    return splits, x.new_empty(layout[1] * splits[0], dtype=torch.int32)


def _splits(x: Tensor, layout: Layout) -> tuple[int, int]:
    """How many blocks share a channel in a reduction and in a map."""
    outer, channels, inner = layout
    arguments = outer * inner * x.element_size(), channels, _limits(x.device)
    return splits_of_reduction(*arguments), splits_of_map(*arguments)


def _blocks(x: Tensor) -> int:
    """Of a map that goes over the memory as it lies, whatever the channels."""
    return splits_of_map(x.nbytes, 1, _limits(x.device))


@cache
def _limits(device: torch.device) -> DeviceLimits:
    properties = torch.cuda.get_device_properties(device)
    kept_bytes = kernels.resident_bytes_per_block(device.index)
    return DeviceLimits(properties.multi_processor_count, kept_bytes)


def _stream(device: torch.device) -> int:
    # Without the object that torch.cuda.current_stream() makes, which takes 5 us.
    return torch._C._cuda_getCurrentRawStream(device.index)
