"""Passes over the sums of products (``csrc/cpu/sums.cpp``)."""

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.kernel_arguments import (
    DTYPE_CODES,
    KIND_CODES,
    NULL,
    address,
    channels_last_rows,
    core,
    floats,
    like,
    write_back,
)
from noisyq_fast.backends.native_cpu.threads import threads
from noisyq_fast.backends.reference import sums as reference
from noisyq_fast.grid import ODD, Grid

operators = Operators()


@operators.register
def moments(sums: Tensor, bound: int) -> tuple[Tensor, ...]:
    sums, rows, channels = channels_last_rows(sums)
    kept, narrows = sums, reference.is_narrow(bound) and sums.dtype != torch.int16
    if narrows:
        kept = torch.empty_like(sums, dtype=torch.int16)
    sums, found = sums.float(), empty_moments(channels)
    core.moments(
        sums=sums.data_ptr(),
        kept=kept.data_ptr() if narrows else NULL,
        rows=rows,
        channels=channels,
        bound=bound,
        **addresses(found),
        threads=threads(),
    )
    return kept, *found


@operators.register
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
    weight, bias = floats(weight), floats(bias)
    moved = running if running is not None and running.is_plain() else None
    layer_bias = None if moved is None else floats(moved.bias)
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
        torch.autograd.graph.increment_version((moved.mean, moved.variance, moved.batches))
    elif running is not None:
        reference.track(running, batch_mean, variance, count)
    return factor, term, mean, inverse, batch_mean, variance


@operators.register
def ends_of_line(low: Tensor, high: Tensor, factor: Tensor, term: Tensor, relu: bool) -> Tensor:
    ends = factor.new_empty(2)
    of_channels = [x.contiguous() for x in (low, high, factor, term)]
    core.ends_of_line(*(x.data_ptr() for x in of_channels), len(low), relu, ends.data_ptr())
    return ends


@operators.register
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


@operators.register
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
    bits = y.new_empty((y.numel() + 7) // 8, dtype=torch.uint8) if wants_zeros else None
    range_ = y.new_empty(2) if wants_range else None
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


@operators.register
def codes_of_sums(
    sums: Tensor, factor: Tensor, term: Tensor, relu: bool, range_: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    if grid.kind == ODD:
        return reference.codes_of_sums(sums, factor, term, relu, range_, grid)
    sums, rows, channels = channels_last_rows(sums)
    codes = torch.empty_like(sums, dtype=grid.code_dtype)
    scale, zero_point = factor.new_empty([]), codes.new_empty([], dtype=torch.uint8)
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


@operators.register
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
    weight = floats(weight)
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


@operators.register
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


def empty_moments(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = torch.empty(channels, dtype=torch.int64, device="cpu")
    low, high = _empty(2, channels)
    return sums, sums.new_empty([channels, 2]), low, high


def _empty(count: int, channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.empty([count, channels], dtype=dtype, device="cpu").unbind())


def addresses(moments: tuple[Tensor, ...] | None) -> dict[str, int]:
    sum_, squares, low, high = (NULL,) * 4 if moments is None else map(address, moments)
    return {"sum": sum_, "squares": squares, "low": low, "high": high}
