"""The gradients of a convolution (``csrc/cpu/convolve_backward.cpp``)."""

from typing import Any

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.kernel_arguments import (
    DTYPE_CODES,
    NULL,
    address,
    channels_last_rows,
    core,
    like,
)
from noisyq_fast.backends.native_cpu.sums import grads_of_sums
from noisyq_fast.backends.native_cpu.threads import threads
from noisyq_fast.backends.reference import composed
from noisyq_fast.backends.reference.products import float_steps
from noisyq_fast.backends.reference.sums import GradOfSums

_MOST_VALUES = 2**18
"""The largest size of an image, its gradient and a weight that a core's caches hold."""

operators = Operators()

_by_parts = composed.convolution_gradients(float_steps, grads_of_sums)["grads_of_convolution"]


@operators.register
def grads_of_convolution(
    grad: Tensor | GradOfSums,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    dtype: torch.dtype,
    to_x: bool,
    to_weight: bool,
    *geometry: Any,
) -> tuple[Tensor | None, Tensor | None]:
    of_sums = grad if isinstance(grad, GradOfSums) else None
    given = grad.grad if isinstance(grad, GradOfSums) else grad
    stride, padding, *_ = geometry
    if given.dtype != dtype or not _multiplies(codes, weight, given, dtype, *geometry):
        how = dtype, to_x, to_weight, *geometry
        return _by_parts(grad, codes, scale, zero_point, weight, *how)
    codes = codes.contiguous(memory_format=torch.channels_last)
    line: tuple[int, ...] = (NULL,) * 7
    narrow = relu = False
    if of_sums is None:
        given = given.contiguous(memory_format=torch.channels_last)
    else:
        sums, _, _ = channels_last_rows(of_sums.sums)
        given, narrow, relu = like(given, sums), sums.dtype == torch.int16, of_sums.relu
        of_channels = of_sums.factor, of_sums.term, *of_sums[5:]
        line = tuple(x.data_ptr() for x in (sums, *of_channels))
    images, channels, *sizes = codes.shape
    outputs, _, *kernel = weight.shape
    dx = torch.empty_like(codes, dtype=dtype) if to_x else None
    dw = scale.new_empty([outputs, *kernel, channels]) if to_weight else None
    core.convolve_backward(
        dtype=DTYPE_CODES[dtype],
        grad=given.data_ptr(),
        of_sums=line,
        narrow=narrow,
        relu=relu,
        codes=codes.data_ptr(),
        are_signed=codes.dtype == torch.int8,
        zero_point=0 if zero_point is None else int(zero_point),
        scale=scale.data_ptr(),
        weight=weight.data_ptr(),
        strides=weight.stride(),
        sizes=[images, *sizes, channels, outputs, *kernel, *stride, *padding],
        dx=address(dx),
        dw=address(dw),
        threads=threads(),
    )
    return dx, None if dw is None else dw.movedim(-1, 1)


def _multiplies(
    codes: Tensor,
    weight: Tensor,
    grad: Tensor,
    dtype: torch.dtype,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    _: list[int],
    groups: int,
) -> bool:
    """Whether ``csrc/cpu/convolve_backward.cpp`` computes these gradients."""
    return (
        codes.dim() == 4
        and not transposed
        and groups == 1
        and max(dilation) == 1
        and weight.shape[0] % 16 == 0
        and weight.shape[1] % 16 == 0
        and weight.shape[-1] in (1, 3)
        and max(x.numel() for x in (codes.shape[1:], grad.shape[1:], weight)) <= _MOST_VALUES
        and dtype in DTYPE_CODES
        and core.has_products(DTYPE_CODES[dtype])
    )
