"""Products of codes.

A product of codes is a sum of integers, which is the same in any order while it is exact: in
float64, as here, below 2^53. Then it is rounded once, to float32.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.reference.sums import moments

operators = Operators()


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
    x, w = steps(codes, zero_point), channel_steps(weight, weight_zero_point, transposed, groups)
    how = stride, padding, dilation, transposed, output_padding, groups
    return laid_out_like(codes, convolved(x.double(), w.double(), *how).float())


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
    """`convolve_codes` as int16 if ``bound`` allows, else float32; and `moments` if requested."""
    how = stride, padding, dilation, False, [0] * len(stride), groups
    sums = convolve_codes(codes, zero_point, weight, weight_zero_point, *how)
    kept, *of_channels = moments(sums, bound)
    return kept, tuple(of_channels) if measures else None


@operators.register
def multiply_codes(
    codes: Tensor, zero_point: Tensor | None, weight: Tensor, weight_zero_point: Tensor | None
) -> Tensor:
    x, w = steps(codes, zero_point), steps(weight, weight_zero_point)
    return torch.matmul(x.double(), w.double().mT).float()


@operators.register
def float_steps(codes: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`steps`, which are exact in every floating dtype."""
    return codes.to(dtype) if zero_point is None else steps(codes, zero_point).to(dtype)


def steps(codes: Tensor, zero_point: Tensor | None) -> Tensor:
    """``codes - zero_point``, to be multiplied by the scale. Zero points belong to the first
    axes."""
    if zero_point is None:
        return codes.to(torch.int16)
    shape = [*zero_point.shape, *[1] * (codes.dim() - zero_point.dim())]
    return codes.to(torch.int16) - zero_point.to(torch.int16).reshape(shape)


def channel_steps(
    weight: Tensor, zero_point: Tensor | None, transposed: bool, groups: int
) -> Tensor:
    """`steps` of a weight: zero points belong to output channels, which are the second axis in a
    transposed convolution."""
    if zero_point is None or not transposed:
        return steps(weight, zero_point)
    by_group = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    moved = steps(by_group, zero_point)
    return moved.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def convolved(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    return torch.convolution(
        x, weight, None, stride, padding, dilation, transposed, output_padding, groups
    )


def laid_out_like(codes: Tensor, sums: Tensor) -> Tensor:
    """``sums`` in channels_last if the input of the convolution is."""
    is_last = codes.dim() == 4 and codes.is_contiguous(memory_format=torch.channels_last)
    return sums.contiguous(
        memory_format=torch.channels_last if is_last else torch.contiguous_format
    )


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which products are computed in the dtype of their operands."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # entering the context costs as much as a small operator


def as_rows(x: Tensor) -> Tensor:
    """As a matrix ``[rows, size of the last axis]``."""
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
