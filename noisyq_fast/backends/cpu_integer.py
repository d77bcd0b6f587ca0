"""Exact products of codes on the CPU: by the kernel in ``csrc/cpu/convolve.cpp``, by oneDNN's 8-bit
kernels where these are proven exact, else by float products of codes. The native passes over their
sums (``csrc/cpu/sums.cpp``), and their gradients (``csrc/cpu/convolve_backward.cpp``)."""

import functools
from typing import Any

import torch
from torch import Tensor

from noisyq_fast.backends import reference_integer as reference
from noisyq_fast.backends.kernel_arguments import (
    DTYPE_CODES,
    KIND_CODES,
    NULL,
    address,
    channels_last_rows,
    core,
    like,
    write_back,
)
from noisyq_fast.backends.native_cpu import backend, threads
from noisyq_fast.grid import ODD, Grid

_EXACT_FLOAT = 2**24
_EXACT_INT = 2**31
_SHIFT = 128
"""The difference between a signed code and the unsigned byte that oneDNN takes in its place."""


@backend.register
def convolve_codes(codes: Tensor, *others: Any) -> Tensor:
    return reference.laid_out_like(codes, _convolve_codes(codes, *others))


def _convolve_codes(
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
            return _convolve(codes, zero_point, w, stride, padding, dilation)[0]
        if w is not None and is_exact_in_8_bits(terms, w.shape, stride, padding, dilation, groups):
            return _convolve_8_bits(codes, zero_point, w, stride, padding, dilation, groups)
    x = reference.steps(codes, zero_point)
    w = reference.channel_steps(weight, weight_zero_point, transposed, groups)
    # Without oneDNN PyTorch takes NNPACK, which transforms float32 images: products of fractions.
    exact = terms * _largest(x) * _largest(w) < _EXACT_FLOAT and torch.backends.mkldnn.enabled
    dtype = torch.float32 if exact else torch.float64
    with torch.autocast("cpu", enabled=False):
        return reference.convolved(x.to(dtype), w.to(dtype), *how).float()


@backend.register
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
    if reference.is_narrow(bound) and groups == 1 and has_own_kernel(codes, weight, padding):
        w = _as_int8(weight, weight_zero_point)
        if w is not None:
            return _convolve(codes, zero_point, w, stride, padding, dilation, True, measures)
    how = stride, padding, dilation, False, [0] * len(stride), groups
    sums = _convolve_codes(codes, zero_point, weight, weight_zero_point, *how)
    if not measures and not reference.is_narrow(bound):
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


def _convolve(
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
    images, channels, *sizes = codes.shape
    outputs, _, *kernel = weight.shape
    of_output = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True)
    ]
    out = torch.empty(
        [images, outputs, *of_output],
        dtype=torch.int16 if narrow else torch.float32,
        memory_format=torch.channels_last,
    )
    moments = _empty_moments(outputs) if measures else None
    height, width = sizes
    core.convolve(
        codes=codes.data_ptr(),
        are_signed=codes.dtype == torch.int8,
        zero_point=0 if zero_point is None else int(zero_point),
        weight=weight.data_ptr(),
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
        **_addresses(moments),
        threads=threads(),
    )
    return out, moments


def _empty_moments(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = torch.empty(channels, dtype=torch.int64)
    low, high = _empty(2, channels)
    return sums, torch.empty(channels, 2, dtype=torch.int64), low, high


def _empty(count: int, channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.empty([count, channels], dtype=dtype).unbind())


def _addresses(moments: tuple[Tensor, ...] | None) -> dict[str, int]:
    sum_, squares, low, high = (NULL,) * 4 if moments is None else map(address, moments)
    return {"sum": sum_, "squares": squares, "low": low, "high": high}


@backend.register
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
    x, w = reference.steps(codes, zero_point), reference.steps(weight, weight_zero_point)
    exact = codes.shape[-1] * _largest(x) * _largest(w) < _EXACT_FLOAT
    dtype = torch.float32 if exact else torch.float64
    with torch.autocast("cpu", enabled=False):
        return torch.matmul(x.to(dtype), w.to(dtype).mT).float()


def _largest(steps: Tensor) -> int:
    return int(steps.abs().max()) if steps.numel() else 0


def _as_int8(weight: Tensor, zero_point: Tensor | None) -> Tensor | None:
    """The steps of a weight as int8, if they fit."""
    if weight.dtype == torch.int8:
        return weight.contiguous()
    steps = reference.steps(weight, zero_point)
    return steps.to(torch.int8).contiguous() if _largest(steps) < 128 else None


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
    ones = torch.ones(weight.shape[0], dtype=torch.float32)
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
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
    x = torch.full((2, weight[1] * groups, *sizes), 255, dtype=torch.uint8)
    w = torch.full(weight, 127, dtype=torch.int8)
    x[1].view(-1)[::3] = 0  # neighbours of which one is at an end and one at the other
    w.view(-1)[1::5] = -128
    try:
        for zero in (0, _SHIFT):
            zero_point = torch.tensor(zero, dtype=torch.uint8)
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
    x = torch.full((33, 512), -128, dtype=torch.int8)
    w = torch.full((17, 512), -128, dtype=torch.int8)
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


# Chains.


@backend.register
def moments(sums: Tensor, bound: int) -> tuple[Tensor, ...]:
    sums, rows, channels = channels_last_rows(sums)
    kept, narrows = sums, reference.is_narrow(bound) and sums.dtype != torch.int16
    if narrows:
        kept = torch.empty_like(sums, dtype=torch.int16)
    sums, found = sums.float(), _empty_moments(channels)
    core.moments(
        sums=sums.data_ptr(),
        kept=kept.data_ptr() if narrows else NULL,
        rows=rows,
        channels=channels,
        bound=bound,
        **_addresses(found),
        threads=threads(),
    )
    return kept, *found


@backend.register
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
    factor, term, mean, inverse = _empty(4, channels)
    batch_mean, variance = _empty(2, channels, torch.float64)
    weight = None if weight is None else weight.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    moved = running if running is not None and running.is_plain() else None
    layer_bias = None if moved is None or moved.bias is None else moved.bias.float().contiguous()
    core.normalization(
        sum=sum_.data_ptr(),
        squares=squares.data_ptr(),
        count=count,
        channels=channels,
        scale=scale.contiguous().data_ptr(),
        weight=address(weight),
        bias=address(bias),
        eps=eps,
        factor=factor.data_ptr(),
        term=term.data_ptr(),
        mean=mean.data_ptr(),
        inverse=inverse.data_ptr(),
        batch_mean=batch_mean.data_ptr(),
        batch_variance=variance.data_ptr(),
        running_mean=NULL if moved is None else moved.mean.data_ptr(),
        running_variance=NULL if moved is None else moved.variance.data_ptr(),
        batches=NULL if moved is None else moved.batches.data_ptr(),
        layer_bias=address(layer_bias),
        momentum=0.0 if moved is None else moved.momentum,
    )
    if moved is not None:
        for x in (moved.mean, moved.variance, moved.batches):
            write_back(x, x)
    elif running is not None:
        reference.track(running, batch_mean, variance, count)
    return factor, term, mean, inverse, batch_mean, variance


@backend.register
def ends_of_line(low: Tensor, high: Tensor, factor: Tensor, term: Tensor, relu: bool) -> Tensor:
    ends = factor.new_empty(2)
    of_channels = [x.contiguous() for x in (low, high, factor, term)]
    core.ends_of_line(*(x.data_ptr() for x in of_channels), len(low), relu, ends.data_ptr())
    return ends


@backend.register
def observe(
    ends: Tensor, running: Tensor, observed: Tensor, averaging_constant: float, grid: Grid
) -> Tensor:
    if grid.kind == ODD:
        return reference.observe(ends, running, observed, averaging_constant, grid)
    written, range_ = running.contiguous(), ends.new_empty(running.shape)
    average = written.data_ptr(), observed.data_ptr(), averaging_constant
    core.observe(ends.data_ptr(), KIND_CODES[grid.kind], *average, range_.data_ptr())
    write_back(written, running)
    write_back(observed, observed)
    return range_


@backend.register
def map_sums(
    sums: Tensor,
    factor: Tensor,
    term: Tensor,
    residual: Tensor | None,
    relu: bool,
    wants_zeros: bool,
    wants_range: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    sums, rows, channels = channels_last_rows(sums)
    y = torch.empty_like(sums, dtype=torch.float32)
    residual = None if residual is None else like(residual, sums)
    bits = torch.empty((y.numel() + 7) // 8, dtype=torch.uint8) if wants_zeros else None
    range_ = torch.empty(2, dtype=torch.float32) if wants_range else None
    core.map_sums(
        sums=sums.data_ptr(),
        narrow=sums.dtype == torch.int16,
        rows=rows,
        channels=channels,
        factor=factor.data_ptr(),
        term=term.data_ptr(),
        residual=address(residual),
        relu=relu,
        y=y.data_ptr(),
        zeros=address(bits),
        range=address(range_),
        threads=threads(),
    )
    return y, bits, range_


@backend.register
def codes_of_sums(
    sums: Tensor, factor: Tensor, term: Tensor, relu: bool, range_: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    if grid.kind == ODD:
        return reference.codes_of_sums(sums, factor, term, relu, range_, grid)
    sums, rows, channels = channels_last_rows(sums)
    codes = torch.empty_like(sums, dtype=grid.code_dtype)
    scale, zero_point = torch.empty([], dtype=torch.float32), torch.empty([], dtype=torch.uint8)
    core.codes_of_sums(
        sums=sums.data_ptr(),
        narrow=sums.dtype == torch.int16,
        rows=rows,
        channels=channels,
        factor=factor.data_ptr(),
        term=term.data_ptr(),
        relu=relu,
        range=range_.contiguous().data_ptr(),
        kind=KIND_CODES[grid.kind],
        qmax=grid.qmax,
        codes=codes.data_ptr(),
        scale=scale.data_ptr(),
        zero_point=zero_point.data_ptr(),
        threads=threads(),
    )
    return codes, scale, zero_point


@backend.register
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
    sums, rows, channels = channels_last_rows(sums)
    grad = like(grad, sums)
    weight = None if weight is None else weight.float().contiguous()
    slope, shift, tilt, of_weight, of_bias = _empty(5, channels)
    core.grads_of_norm(
        dtype=DTYPE_CODES[grad.dtype],
        grad=grad.data_ptr(),
        sums=sums.data_ptr(),
        narrow=sums.dtype == torch.int16,
        rows=rows,
        channels=channels,
        factor=factor.data_ptr(),
        term=term.data_ptr(),
        relu=relu,
        mean=mean.data_ptr(),
        inverse=inverse.data_ptr(),
        scale=scale.contiguous().data_ptr(),
        weight=address(weight),
        uses_batch=uses_batch,
        slope=slope.data_ptr(),
        shift=shift.data_ptr(),
        tilt=tilt.data_ptr(),
        of_weight=of_weight.data_ptr(),
        of_bias=of_bias.data_ptr(),
        threads=threads(),
    )
    return (slope, shift, tilt), of_weight, of_bias


@backend.register
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
    sums, rows, channels = channels_last_rows(sums)
    grad = like(grad, sums)
    out = torch.empty_like(grad)
    core.grads_of_sums(
        dtype=DTYPE_CODES[grad.dtype],
        grad=grad.data_ptr(),
        sums=sums.data_ptr(),
        narrow=sums.dtype == torch.int16,
        rows=rows,
        channels=channels,
        factor=factor.data_ptr(),
        term=term.data_ptr(),
        relu=relu,
        mean=mean.data_ptr(),
        slope=slope.data_ptr(),
        shift=shift.data_ptr(),
        tilt=tilt.data_ptr(),
        out=out.data_ptr(),
        threads=threads(),
    )
    return out


# The gradients of a convolution.

_by_parts = reference.register_gradients(backend)
_MOST_VALUES = 2**18
"""The largest size of an image, its gradient and a weight that a core's caches hold."""


@backend.register
def grads_of_convolution(
    grad: Tensor | reference.GradOfSums,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    dtype: torch.dtype,
    to_x: bool,
    to_weight: bool,
    *geometry: Any,
) -> tuple[Tensor | None, Tensor | None]:
    of_sums = grad if isinstance(grad, reference.GradOfSums) else None
    given = grad.grad if isinstance(grad, reference.GradOfSums) else grad
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
    dw = torch.empty([outputs, *kernel, channels]) if to_weight else None
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


reference.register_products(backend, _convolve_codes, multiply_codes, map_sums)
reference.register_norm(backend)
