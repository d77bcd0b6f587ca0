"""Products of codes (`product_kernels`), if a bound proves that their sums
fit into 32 bits; the reference computes all others, and those of other dimensions."""

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.kernel_arguments import contiguous, dense, floats
from noisyq_fast.backends.on_triton import launch
from noisyq_fast.backends.on_triton.grid_launches import grid_kernels
from noisyq_fast.backends.on_triton.sums import moments, moments_of_products
from noisyq_fast.backends.on_triton.tiling import product_tile
from noisyq_fast.backends.reference import composed
from noisyq_fast.backends.reference import products as reference
from noisyq_fast.backends.reference.sums import is_narrow

_EXACT_INT = 2**31
_MOST_PLACES = 2**31 - 2**15
"""The largest count that fits into 32 bits, up to the end of the last tile."""
_SHIFT = 128
"""The difference between an unsigned code and the signed byte that is multiplied in its place."""
_FEW = 16
"""Up to this number of channels per group, matrix products would be mostly padding."""

operators = Operators()


class _Scales(NamedTuple):
    """The scales by which sums are multiplied, and the bias that is added."""

    of_codes: Tensor
    of_weight: Tensor
    bias: Tensor | None


@operators.register
def convolve_codes(
    codes: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    operands = codes, zero_point, weight, weight_zero_point
    how = stride, padding, dilation, transposed, output_padding, groups
    if not transposed and _is_taken(codes, weight) and codes.dim() == 4:
        out = _convolve(*operands, stride, padding, dilation, groups, None, torch.float32)
        if out is not None:
            return reference.laid_out_like(codes, out)
    return reference.convolve_codes(*operands, *how)


@operators.register
def convolve_sums(
    codes: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    bound: int,
    measures: bool,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    operands = codes, zero_point, weight, weight_zero_point
    how = stride, padding, dilation, groups
    narrow = is_narrow(bound)
    sums = found = None
    if _is_taken(codes, weight) and codes.dim() == 4:
        if measures and narrow and not _is_few(weight, groups):
            found = torch.zeros(4, len(weight), dtype=torch.int64, device=codes.device)
        dtype = torch.int16 if narrow else torch.float32
        sums = _convolve(*operands, *how, None, dtype, found)
    if sums is None:
        return reference.convolve_sums(*operands, *how, bound, measures)
    if not measures:
        return sums, None
    if found is not None:
        return sums, moments_of_products(found)
    kept, *of_channels = moments(sums, bound)
    return kept, tuple(of_channels)


@operators.register
def float_steps(codes: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    if zero_point is not None and zero_point.dim() > 0:
        return reference.float_steps(codes, zero_point, dtype)
    codes, y = dense(codes, dtype)
    launch.launch_map(grid_kernels().dequantize, codes, None, None, zero_point, y)
    return y


@operators.register
def multiply_codes(
    codes: Tensor, zero_point: Tensor | None, weight: Tensor, weight_zero_point: Tensor | None
) -> Tensor:
    operands = codes, zero_point, weight, weight_zero_point
    if weight.dim() == 2 and _is_taken(codes, weight):
        return _multiply(*operands, None, torch.float32)
    return reference.multiply_codes(*operands)


@operators.register
def integer_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    masked: Tensor | None,
    weight_codes: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_masked: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    is_taken = _is_taken(codes, weight_codes) and codes.dim() == 4 and scale.dim() == 0
    if is_taken and not transposed:
        operands = codes, zero_point, weight_codes, weight_zero_point
        scales = _Scales(scale, weight_scale, bias)
        out = _convolve(*operands, stride, padding, dilation, groups, scales, x.dtype)
        if out is not None:
            return reference.laid_out_like(codes, out)
    return composed.operators["integer_convolution"](
        *(x, weight, bias, codes, scale, zero_point, masked),
        *(weight_codes, weight_scale, weight_zero_point, weight_masked),
        *(stride, padding, dilation, transposed, output_padding, groups),
    )


@operators.register
def integer_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    masked: Tensor | None,
    weight_codes: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_masked: Tensor | None,
) -> Tensor:
    if weight_codes.dim() == 2 and _is_taken(codes, weight_codes):
        scales = _Scales(scale, weight_scale, bias)
        return _multiply(codes, zero_point, weight_codes, weight_zero_point, scales, x.dtype)
    return composed.operators["integer_linear"](
        *(x, weight, bias, codes, scale, zero_point, masked),
        *(weight_codes, weight_scale, weight_zero_point, weight_masked),
    )


def _is_taken(codes: Tensor, weight: Tensor) -> bool:
    """Whether there are terms, and sums and rows fit into 32 bits."""
    if codes.numel() == 0 or weight.numel() == 0:
        return False
    largest = weight[0].numel() * _largest(codes) * _largest(weight)
    return largest < _EXACT_INT and codes.numel() // weight.shape[1] < _MOST_PLACES


def _largest(codes: Tensor) -> int:
    """An upper bound of ``|code - zero_point|``."""
    return 128 if codes.dtype == torch.int8 else 255


def _convolve(
    codes: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scales: _Scales | None,
    dtype: torch.dtype,
    found: Tensor | None = None,
) -> Tensor | None:
    """The codes with the channels last in memory. None if images are smaller than the window, or
    positions in one do not fit into 32 bits."""
    images, _, *sizes = codes.shape
    outputs, _, *window = weight.shape
    of_output = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(sizes, window, stride, padding, dilation, strict=True)
    ]
    last = images * of_output[0] * of_output[1], codes[0].numel(), sum(sizes) + 2 * sum(padding)
    if min(of_output) < 1 or max(last) >= _MOST_PLACES:
        return None
    out = torch.empty(
        [images, outputs, *of_output],
        dtype=dtype,
        device=codes.device,
        memory_format=torch.channels_last,
    )
    codes = codes.contiguous(memory_format=torch.channels_last)
    steps = *stride, *padding, *dilation, None if window == [1, 1] else window[1]
    operands = codes, zero_point, weight, weight_zero_point
    _launch(*operands, sizes, of_output, steps, groups, scales, out, found)
    return out


def _multiply(
    codes: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    scales: _Scales | None,
    dtype: torch.dtype,
) -> Tensor:
    """A linear product: each row is an image of one pixel."""
    rows = codes.shape[:-1]
    if _is_of_images(zero_point, scales):
        if zero_point is not None:
            zero_point = _of_rows(zero_point, rows)
        if scales is not None:
            scales = scales._replace(of_codes=_of_rows(scales.of_codes, rows))
    out = torch.empty([*rows, len(weight)], dtype=dtype, device=codes.device)
    steps = 1, 1, 0, 0, 1, 1, None
    codes = codes.contiguous()
    _launch(codes, zero_point, weight, weight_zero_point, (1, 1), (1, 1), steps, 1, scales, out)
    return out


def _of_rows(x: Tensor, rows: torch.Size) -> Tensor:
    """Expands values of the first axes to one for each of ``rows``."""
    return x.reshape([*x.shape, *[1] * (len(rows) - x.dim())]).expand(rows).reshape(-1)


def _launch(
    codes: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    sizes: Sequence[int],
    of_output: Sequence[int],
    window: tuple[int | None, ...],
    groups: int,
    scales: _Scales | None,
    out: Tensor,
    found: Tensor | None = None,
) -> None:
    outputs, of_pixel, *_ = weight.shape
    is_few = _is_few(weight, groups)
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1)
    weight = weight.reshape(outputs, -1).contiguous()
    of_sum = weight.shape[1]
    of_group = outputs // groups
    pixels = out.numel() // outputs

    operands: tuple[Tensor | None, ...]
    if is_few:
        kernel, columns, operands = _kernels().multiply_few, outputs, (weight, weight_zero_point)
    else:
        kernel, columns = _kernels().multiply, of_group
        operands = _signed(weight, weight_zero_point, codes.dtype == torch.uint8)
    tile = product_tile(pixels, columns, of_sum, launch.limits(codes.device))
    # Moments need registers.
    warps = max(tile[0] * tile[1] // (2048 if found is None else 1024), min(tile[0] // 16, 4))
    launch.launch(
        codes,
        kernel,
        (-(-pixels // tile[0]) * -(-columns // tile[1]), 1 if is_few else groups),
        warps,
        *(codes, contiguous(zero_point), *operands),
        *((None,) * 3 if scales is None else _prepared(scales, outputs)),
        *((out,) if is_few else (out, found)),
        *((pixels, *of_output, of_group), (*sizes, of_pixel * groups), window),
        *((of_sum, of_pixel), groups, tile),
        _is_of_images(zero_point, scales),
    )


def _is_few(weight: Tensor, groups: int) -> bool:
    return groups > 1 and min(weight.shape[1], len(weight) // groups) < _FEW


def _is_of_images(zero_point: Tensor | None, scales: _Scales | None) -> bool:
    of_codes = zero_point, None if scales is None else scales.of_codes
    return any(x is not None and x.dim() > 0 for x in of_codes)


def _signed(
    weight: Tensor, zero_point: Tensor | None, codes_are_unsigned: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A weight ``[outputs, terms]`` as signed bytes, its zero points, and the sums of each output
    channel, if they are needed."""
    if weight.dtype == torch.uint8:
        weight = (weight ^ _SHIFT).view(torch.int8)
        if zero_point is None:
            zero_point = torch.zeros(len(weight), dtype=torch.uint8, device=weight.device)
        zero_point = zero_point.to(torch.int32) - _SHIFT
    sums = None
    if codes_are_unsigned:
        sums = weight.sum(1, dtype=torch.int32)
        if zero_point is not None:
            sums = sums - weight.shape[1] * zero_point
    return weight, zero_point, sums


def _prepared(scales: _Scales, outputs: int) -> tuple[Tensor, Tensor, Tensor | None]:
    bias = floats(scales.bias)
    return scales.of_codes.contiguous(), scales.of_weight.expand(outputs).contiguous(), bias


@cache
def _kernels() -> ModuleType:
    """Imported when first needed, like the others."""
    from noisyq_fast.backends.on_triton import product_kernels

    return product_kernels
