"""Exact products of codes: by the kernel in ``csrc/cpu/convolve.cpp``, by oneDNN's 8-bit kernels
where these are proven exact, else by float products of codes."""

import functools
from typing import Any

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.kernel_arguments import DTYPE_CODES, channels_last_rows, core
from noisyq_fast.backends.native_cpu.sums import addresses, empty_moments, moments
from noisyq_fast.backends.native_cpu.threads import threads
from noisyq_fast.backends.reference import products as reference
from noisyq_fast.backends.reference.sums import is_narrow

_EXACT_FLOAT = 2**24
_EXACT_INT = 2**31
_LARGEST_STEP = 255
_SHIFT = 128
"""The difference between a signed code and the unsigned byte that oneDNN takes in its place."""

operators = Operators()


@operators.register
def convolve_codes(codes: Tensor, *others: Any) -> Tensor:
    return reference.laid_out_like(codes, convolve(codes, *others))


def convolve(
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
    """As `convolve_codes`, in any memory format."""
    how = stride, padding, dilation, transposed, output_padding, groups
    terms = weight[0].numel() if not transposed else weight.numel() // weight.shape[1]
    if not transposed and codes.dim() == 4 and codes.numel() and weight.numel():
        w = _as_int8(weight, weight_zero_point)
        if (
            w is not None
            and terms * 255 * 128 < _EXACT_INT
            and groups == 1
            and has_own_kernel(codes, weight, padding)
        ):
            return _convolve_by_kernel(codes, zero_point, w, stride, padding, dilation)[0]
        if w is not None and is_exact_in_8_bits(terms, w.shape, stride, padding, dilation, groups):
            w = w.contiguous()
            return _convolve_8_bits(codes, zero_point, w, stride, padding, dilation, groups)
    x = reference.steps(codes, zero_point)
    w = reference.channel_steps(weight, weight_zero_point, transposed, groups)
    # Without oneDNN PyTorch takes NNPACK, which transforms float32 images: products of fractions.
    exact = terms * _largest(x) * _largest(w) < _EXACT_FLOAT and torch.backends.mkldnn.enabled
    dtype = torch.float32 if exact else torch.float64
    with reference.without_autocast("cpu"):
        return reference.convolved(x.to(dtype), w.to(dtype), *how).float()


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
    if is_narrow(bound) and groups == 1 and has_own_kernel(codes, weight, padding):
        w = _as_int8(weight, weight_zero_point)
        if w is not None:
            return _convolve_by_kernel(
                codes, zero_point, w, stride, padding, dilation, True, measures
            )
    how = stride, padding, dilation, False, [0] * len(stride), groups
    sums = convolve(codes, zero_point, weight, weight_zero_point, *how)
    if not measures and not is_narrow(bound):
        return channels_last_rows(sums)[0], None
    kept, *of_channels = moments(sums, bound)
    return kept, tuple(of_channels) if measures else None


def has_own_kernel(codes: Tensor, weight: Tensor, padding: list[int]) -> bool:
    return (
        core.has_dot_products()
        and codes.dim() == 4
        and codes.numel() > 0
        and weight.numel() > 0
        and codes.shape[-1] + 2 * padding[-1] < 2**15
    )


def _convolve_by_kernel(
    codes: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    narrow: bool = False,
    measures: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """With the kernel in ``csrc/cpu/convolve.cpp``."""
    codes = codes.contiguous(memory_format=torch.channels_last)
    if not weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.contiguous()
    images, channels, *sizes = codes.shape
    outputs, _, *kernel = weight.shape
    of_output = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True)
    ]
    out = torch.empty(
        [images, outputs, *of_output],
        dtype=torch.int16 if narrow else torch.float32,
        device=codes.device,
        memory_format=torch.channels_last,
    )
    moments = empty_moments(outputs) if measures else None
    height, width = sizes
    core.convolve(
        codes=codes.data_ptr(),
        are_signed=codes.dtype == torch.int8,
        zero_point=0 if zero_point is None else int(zero_point),
        weight=weight.data_ptr(),
        strides=weight.stride(),
        images=images,
        height=height,
        width=width,
        channels=channels,
        outputs=outputs,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        narrow=narrow,
        out=out.data_ptr(),
        **addresses(moments),
        threads=threads(),
    )
    return out, moments


@operators.register
def multiply_codes(
    codes: Tensor, zero_point: Tensor | None, weight: Tensor, weight_zero_point: Tensor | None
) -> Tensor:
    if weight.dim() > 2 or (zero_point is not None and zero_point.dim() > 0):
        return _multiply_floats(codes, zero_point, weight, weight_zero_point)
    w = _as_int8(weight, weight_zero_point)
    rows = reference.as_rows(codes).contiguous()  # of others PyTorch computes wrong products
    terms = rows.shape[1]
    fits = terms > 1 and terms * 255 * 128 < _EXACT_INT  # of one term PyTorch's products are wrong
    if w is None or not rows.numel() or not fits or not has_exact_products():
        return _multiply_floats(codes, zero_point, weight, weight_zero_point)
    w = w.contiguous()
    # From c - z = (c - 128) + (128 - z).
    shifted = codes.dtype == torch.uint8
    if shifted:
        rows = (rows ^ _SHIFT).view(torch.int8)
    sums = torch._int_mm(rows, w.T)
    zero = 0 if zero_point is None else int(zero_point)
    if shifted and zero != _SHIFT:
        sums += (_SHIFT - zero) * w.sum(1, dtype=torch.int32)
    return sums.float().reshape(*codes.shape[:-1], w.shape[0])


def _multiply_floats(
    codes: Tensor, zero_point: Tensor | None, weight: Tensor, weight_zero_point: Tensor | None
) -> Tensor:
    x = reference.float_steps(codes, zero_point, torch.float32)
    w = reference.float_steps(weight, weight_zero_point, torch.float32)
    terms = codes.shape[-1]
    may_round = terms * _LARGEST_STEP**2 >= _EXACT_FLOAT  # without a look at the steps
    if may_round and terms * _largest(x) * _largest(w) >= _EXACT_FLOAT:
        x, w = x.double(), w.double()
    with reference.without_autocast("cpu"):
        return torch.matmul(x, w.mT).float()


def _largest(steps: Tensor) -> int:
    return int(steps.abs().max()) if steps.numel() else 0


def _as_int8(weight: Tensor, zero_point: Tensor | None) -> Tensor | None:
    """The steps of a weight as int8, if they fit."""
    if weight.dtype == torch.int8:
        return weight
    steps = reference.steps(weight, zero_point)
    return steps.to(torch.int8) if _largest(steps) < 128 else None


def _convolve_8_bits(
    codes: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    if codes.dtype == torch.int8:
        x, zero = codes.view(torch.uint8) ^ _SHIFT, _SHIFT
    else:
        x, zero = codes, 0 if zero_point is None else int(zero_point)
    x = x.contiguous(memory_format=torch.channels_last)
    ones = weight.new_ones(weight.shape[0], dtype=torch.float32)
    zeros = weight.new_zeros(weight.shape[0], dtype=torch.int64)
    onednn = torch.ops.onednn
    packed = onednn.qconv_prepack(
        weight, ones, 1.0, zero, stride, padding, dilation, groups, list(x.shape)
    )
    return onednn.qconv2d_pointwise(
        *(x, 1.0, zero, packed, ones, zeros, None, stride, padding, dilation, groups),
        *(1.0, 0, torch.float32, "none", [], "none"),
    )


def is_exact_in_8_bits(
    terms: int,
    weight: torch.Size,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> bool:
    """Whether oneDNN's convolutions of this class are exact: sums of this many terms fit into 32
    bits, and a test with extreme codes gives the exact sums."""
    if terms * 255 * 128 >= _EXACT_INT:
        return False
    return _passes(tuple(weight), tuple(stride), tuple(padding), tuple(dilation), groups)


@functools.cache
def _passes(
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> bool:
    how = list(stride), list(padding), list(dilation), groups
    sizes = [d * (k - 1) + 3 for k, d in zip(weight[2:], dilation, strict=True)]
    x = torch.full((2, weight[1] * groups, *sizes), 255, dtype=torch.uint8, device="cpu")
    w = torch.full(weight, 127, dtype=torch.int8, device="cpu")
    x[1].view(-1)[::3] = 0  # neighbours of which one is at an end and one at the other
    w.view(-1)[1::5] = -128
    try:
        for zero in (0, _SHIFT):
            zero_point = torch.tensor(zero, dtype=torch.uint8, device="cpu")
            sums = _convolve_8_bits(x, zero_point, w, *how)
            exact = torch.convolution(
                *(x.double() - zero, w.double(), None, *how[:3], False, [0, 0], groups)
            )
            if not torch.equal(sums, exact.float()):
                return False
    except (RuntimeError, AttributeError):  # a private interface of PyTorch
        return False
    return True


@functools.cache
def has_exact_products() -> bool:
    """Whether PyTorch's product of int8 matrices is exact on this machine."""
    x = torch.full((33, 512), -128, dtype=torch.int8, device="cpu")
    w = torch.full((17, 512), -128, dtype=torch.int8, device="cpu")
    x[::2, ::3] = 127
    w[1::2, 1::3] = 127
    try:
        sums = torch._int_mm(x, w.T)
    except (RuntimeError, AttributeError):  # a private interface of PyTorch
        return False
    return torch.equal(sums.double(), x.double() @ w.double().T)


def routes() -> dict[str, str]:
    """For `info`: how products are computed on this machine."""
    floats = "float32 or float64 products of codes"
    ours = core is not None and core.has_dot_products()
    works = _passes((16, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    onednn = "oneDNN, 8 bits" if works else floats
    named = ((torch.float32, "float32"), (torch.bfloat16, "bfloat16"))
    types = [
        name for dtype, name in named if core is not None and core.has_products(DTYPE_CODES[dtype])
    ]
    return {
        "conv2d": "own kernel, 8 bits (AVX512-VNNI)" if ours else onednn,
        "conv2d, groups": onednn,
        "linear": "oneDNN, 8 bits" if has_exact_products() else floats,
        "others": floats,
        "gradients of conv2d": f"own kernel, {' and '.join(types)}" if types else "PyTorch",
    }
