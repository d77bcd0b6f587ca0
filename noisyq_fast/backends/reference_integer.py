"""The executable specification of products of codes and of what follows them, in plain PyTorch.

A product of codes is a sum of whole numbers, and so the same in any order while it is exact: in
float64, as here, below 2^53. Then it is rounded once, to float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Backend
from noisyq_fast.backends.reference import (
    NOTHING,
    average_,
    backend,
    pack,
    quantize_fixed_range_on_grid,
)
from noisyq_fast.grid import Grid


@backend.register
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
    """`convolve_codes`, kept as narrow as ``bound`` allows; and where asked for, `moments`."""
    how = stride, padding, dilation, False, [0] * len(stride), groups
    sums = convolve_codes(codes, zero_point, weight, weight_zero_point, *how)
    kept, *of_channels = moments(sums, bound)
    return kept, tuple(of_channels) if measures else None


@backend.register
def multiply_codes(
    codes: Tensor, zero_point: Tensor | None, weight: Tensor, weight_zero_point: Tensor | None
) -> Tensor:
    x, w = steps(codes, zero_point), steps(weight, weight_zero_point)
    return torch.matmul(x.double(), w.double().mT).float()


@backend.register
def float_steps(codes: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`steps`, which are exact in every floating dtype."""
    return codes.to(dtype) if zero_point is None else steps(codes, zero_point).to(dtype)


def steps(codes: Tensor, zero_point: Tensor | None) -> Tensor:
    """``codes - zero_point``: what the scale is to be multiplied by. The zero points are of the
    first axes."""
    if zero_point is None:
        return codes.to(torch.int16)
    shape = [*zero_point.shape, *[1] * (codes.dim() - zero_point.dim())]
    return codes.to(torch.int16) - zero_point.to(torch.int16).reshape(shape)


def channel_steps(
    weight: Tensor, zero_point: Tensor | None, transposed: bool, groups: int
) -> Tensor:
    """Of a weight: its zero points are of the output channels, which are second in a transposed
    convolution."""
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


# What follows. `sums`, v, are float32, or int16 where that is wide enough, with their channels
# second, or last where there are two axes.


@backend.register
def moments(sums: Tensor, bound: int) -> tuple[Tensor, ...]:
    """``sums`` as they are kept, and of each channel the sum of v, the sum of v^2 as a pair of its
    upper and lower 32 bits, the least and the largest v."""
    whole = by_channel(sums).long()
    squares = whole * whole
    upper, lower = (squares >> 32).sum(1), (squares & 0xFFFFFFFF).sum(1)
    squares = torch.stack([upper + (lower >> 32), lower & 0xFFFFFFFF], 1)
    kept = sums.to(torch.int16) if is_narrow(bound) else sums
    if whole.shape[1] == 0:
        infinite = sums.new_full(whole.shape[:1], float("inf"), dtype=torch.float32)
        return kept, whole.sum(1), squares, infinite, -infinite
    return kept, whole.sum(1), squares, whole.amin(1).float(), whole.amax(1).float()


class Running(NamedTuple):
    """Running statistics of a batch norm: of ``v * scale + bias``, and how many batches they are
    of."""

    mean: Tensor
    variance: Tensor
    batches: Tensor
    bias: Tensor | None
    momentum: float

    def is_plain(self) -> bool:
        """Whether a kernel can move them where they are."""
        return all(x.dtype == torch.float32 and x.is_contiguous() for x in self[:2])


@backend.register
def normalization(
    sum_: Tensor,
    squares: Tensor,
    count: int,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: Running | None = None,
) -> tuple[Tensor, ...]:
    """Batch norm of ``v * scale`` as ``v * factor + term``: these, the mean of v, 1 / the standard
    deviation, and in float64 the mean and the variance of ``v * scale``, towards which ``running``
    moves. Equations: `noisyq_fast.integer.batch_norm`."""
    means, offsets = [], []
    for total, (upper, lower) in zip(sum_.tolist(), squares.tolist(), strict=True):
        p = round(float(total) / count)  # half to even
        d = float(total - count * p)
        means.append(p + d / count)
        offsets.append(float((upper << 32) + lower - p * (2 * total - count * p)) - d * d / count)
    mean, centred = (
        torch.tensor(value, dtype=torch.float64, device=scale.device) for value in (means, offsets)
    )
    s = scale.double()
    variance = centred / torch.full_like(centred, count) * (s * s)
    if running is not None:
        track(running, mean * s, variance, count)
    inverse = (1 / (variance + eps).sqrt()).float()
    factor, term = line(mean * s, inverse, scale, weight, bias)
    return factor, term, mean.float(), inverse, mean * s, variance


def line(
    mean: Tensor, inverse: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The batch norm with this mean, float64, and 1 / standard deviation: a factor and a term."""
    slope = inverse.double() if weight is None else weight.double() * inverse.double()
    shift = mean * slope
    term = -shift if bias is None else bias.double() - shift
    return (slope * scale.double()).float(), term.float()


def track(running: Running, mean: Tensor, variance: Tensor, count: int) -> None:
    """Moves running statistics towards those of a batch of ``count`` values."""
    running.batches.add_(1)
    if running.bias is not None:
        mean = mean + running.bias.double()
    variance = variance * (count / (count - 1))
    for average, batch in ((running.mean, mean), (running.variance, variance)):
        average.mul_(1 - running.momentum).add_(running.momentum * batch.to(average.dtype))


@backend.register
def ends_of_line(low: Tensor, high: Tensor, factor: Tensor, term: Tensor, relu: bool) -> Tensor:
    """As `ends` of ``relu(v * factor + term)``, from the least and the largest v of each channel:
    rounding is monotone."""
    low, high = (end * factor + term for end in (low, high))
    low, high = torch.minimum(low, high).amin(), torch.maximum(low, high).amax()
    return range_between(low.clamp(min=0) if relu else low, high)


@backend.register
def observe(
    ends: Tensor, running: Tensor, observed: Tensor, averaging_constant: float, grid: Grid
) -> Tensor:
    """The range of a batch as a whole, of which these are the `ends`. The average moves towards
    it."""
    batch = range_of_ends(ends, grid)
    average_(running, observed, batch, averaging_constant, grid.is_affine)
    return batch


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
    """y = relu(v * factor + term + residual), each operation rounded once, without what there is
    none of; a bit for each y that is not above 0; and min(y, 0) and max(y, 0)."""
    y = sums.float() * along_channels(factor, sums) + along_channels(term, sums)
    if residual is not None:
        y = y + residual
    if relu:
        y = torch.where(y < 0, 0, y)
    y = torch.empty_like(sums, dtype=torch.float32).copy_(y)
    zeros = pack(torch.empty_like(y, dtype=torch.bool).copy_(~(y > 0))) if wants_zeros else None
    return y, zeros, ends(y) if wants_range else None


@backend.register
def codes_of_sums(
    sums: Tensor, factor: Tensor, term: Tensor, relu: bool, range_: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of ``relu(v * factor + term)`` in a range, their scale and their zero point. The
    scale is NaN where a factor or a term is not finite."""
    y, _, _ = map_sums(sums, factor, term, None, relu, False, False)
    codes, scale, zero_point, _ = quantize_fixed_range_on_grid(y, range_, grid, None, NOTHING)
    return codes, scale_of_line(scale, factor, term), zero_point


def scale_of_line(scale: Tensor, factor: Tensor, term: Tensor) -> Tensor:
    # 0 times what is finite is 0.
    return scale + ((factor + term) * 0).sum()


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
    """The backward of a batch norm: of each channel ``slope``, ``shift`` and ``tilt``, with which
    `grads_of_sums` goes on, and the gradients of its weight and bias. Sums are float64; equal in
    other backends up to their order."""
    g = by_channel(_behind(grad, sums, factor, term, relu)).double()
    centred = by_channel(sums.float() - along_channels(mean, sums)).double()
    total, product = g.sum(1), (g * centred).sum(1)
    slope = inverse.double() if weight is None else weight.double() * inverse.double()
    spread = inverse.double() * scale.double()  # from v to normalized values
    shift = tilt = torch.zeros_like(slope)
    if uses_batch:
        count = torch.full_like(slope, g.shape[1])
        shift, tilt = slope * total / count, slope * spread * spread * product / count
    line = slope.float(), shift.float(), tilt.float()
    return line, (spread * product).float(), total.float()


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
    """``slope * g - shift - (v - mean) * tilt``, in the dtype of the gradient."""
    mean, slope, shift, tilt = (along_channels(x, sums) for x in (mean, slope, shift, tilt))
    g = _behind(grad, sums, factor, term, relu)
    out = slope * g - shift - (sums.float() - mean) * tilt
    return torch.empty_like(sums, dtype=grad.dtype).copy_(out)


class GradOfSums(NamedTuple):
    """What `grads_of_sums` takes, before the gradient is made."""

    grad: Tensor
    sums: Tensor
    factor: Tensor
    term: Tensor
    relu: bool
    mean: Tensor
    slope: Tensor
    shift: Tensor
    tilt: Tensor


def _behind(grad: Tensor, sums: Tensor, factor: Tensor, term: Tensor, relu: bool) -> Tensor:
    grad = grad.float()
    if not relu:
        return grad
    y, _, _ = map_sums(sums, factor, term, None, False, False, False)
    return torch.where(y > 0, grad, 0)


def laid_out_like(codes: Tensor, sums: Tensor) -> Tensor:
    """With the channels last where the input of the convolution has them last."""
    is_last = codes.dim() == 4 and codes.is_contiguous(memory_format=torch.channels_last)
    return sums.contiguous(
        memory_format=torch.channels_last if is_last else torch.contiguous_format
    )


def is_narrow(bound: int) -> bool:
    """Whether sums up to ``bound`` are kept as int16."""
    return bound < 2**15


def ends(y: Tensor) -> Tensor:
    """min(y, 0) and max(y, 0); the latter NaN where y holds a NaN or the former is not finite (then
    the former may be anything)."""
    return y.new_zeros(2) if y.numel() == 0 else range_between(y.amin(), y.amax())


def range_between(low: Tensor, high: Tensor) -> Tensor:
    low, high = low.clamp(max=0), high.clamp(min=0)
    return torch.stack([low, high.masked_fill(~low.isfinite(), torch.nan)])


def range_of_ends(ends: Tensor, grid: Grid) -> Tensor:
    """As `reference.range_of`."""
    low, high = ends
    if grid.is_affine:
        return ends
    return high if grid.is_unsigned else torch.maximum(-low, high)


def as_rows(x: Tensor) -> Tensor:
    """As a matrix, of the last axis."""
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def channel_axis(sums: Tensor) -> int:
    return 1 if sums.dim() > 2 else -1


def by_channel(sums: Tensor) -> Tensor:
    return sums.movedim(channel_axis(sums), 0).flatten(1)


def along_channels(of_channel: Tensor, sums: Tensor) -> Tensor:
    return of_channel.reshape([-1, *[1] * (sums.dim() - 2)]) if sums.dim() > 2 else of_channel


# The whole product, of the same functions in every backend.


def register_products(
    backend: Backend, convolve: Callable, multiply: Callable, map_sums: Callable
) -> None:
    """Registers the products with their scales, and batch norm, made of what they consist of."""

    def scaled(
        sums: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        factor = scale * weight_scale
        term = torch.zeros_like(factor) if bias is None else bias.float().contiguous()
        return map_sums(sums, factor, term, None, False, False, False)[0].to(dtype)

    @backend.register
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
        *geometry: Any,
    ) -> Tensor:
        sums = convolve(codes, zero_point, weight_codes, weight_zero_point, *geometry)
        return laid_out_like(codes, scaled(sums, scale, weight_scale, bias, x.dtype))

    @backend.register
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
        sums = multiply(codes, zero_point, weight_codes, weight_zero_point)
        if scale.dim() == 0 and weight_codes.dim() == 2:
            y = scaled(as_rows(sums), scale, weight_scale, bias, x.dtype)
            # No view, which could not be changed in place behind its gradient.
            return torch.ops.aten._unsafe_view(y, sums.shape)
        # A scale for each token, or for each group: of the axes before the last.
        scale = scale.reshape([*scale.shape, *[1] * (codes.dim() - scale.dim())])
        factor = scale * weight_scale.reshape(*weight_codes.shape[:-2], 1, weight_codes.shape[-2])
        term = 0 if bias is None else bias.float().unsqueeze(-2)
        return (sums * factor + term).to(x.dtype)


def register_gradients(of: Backend) -> Callable:
    """Registers the gradients of a convolution, made of their parts."""

    def part(name: str) -> Callable:
        return of.functions.get(name) or backend.functions[name]

    @of.register
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
        """By the dequantized x and by ``weight``, that is dequantized; products of ``dtype``."""
        whole = part("grads_of_sums")(*grad) if isinstance(grad, GradOfSums) else grad
        # Of the gradient of x only its shape matters.
        x = (
            part("float_steps")(codes, zero_point, dtype)
            if to_weight
            else without_values(codes, dtype)
        )
        dx, dw, _ = torch.ops.aten.convolution_backward(
            *(whole.to(dtype), x, weight.to(dtype), None, *geometry, [to_x, to_weight, False])
        )
        return dx, dw.float() * scale if to_weight else None

    return grads_of_convolution


def without_values(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a shape, for gradients to flow to, of one element of memory, which nothing
    reads."""
    return torch.empty((), dtype=dtype or like.dtype, device=like.device).expand(like.shape)


def register_norm(backend: Backend) -> None:
    """Registers batch norm of sums, made of its parts."""
    compute = backend.functions

    @backend.register
    def statistics_of_sums(
        sums: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        bound: int,
    ) -> tuple[Tensor, ...]:
        _, total, squares, _, _ = compute["moments"](sums, bound)
        count = sums.numel() // scale.numel()
        found = compute["normalization"](total, squares, count, scale, weight, bias, eps)
        return tuple(x.clone() for x in found)  # outputs of operators share no memory

    @backend.register
    def norm_of_sums(
        product: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        sums: Tensor,
        scale: Tensor,
        factor: Tensor,
        term: Tensor,
        *_: Any,
    ) -> Tensor:
        y, _, _ = compute["map_sums"](sums, factor, term, None, False, False, False)
        return torch.empty_like(product).copy_(y)

    @backend.register
    def grads_of_norm_of_sums(
        grad: Tensor,
        weight: Tensor | None,
        sums: Tensor,
        scale: Tensor,
        factor: Tensor,
        term: Tensor,
        mean: Tensor,
        inverse: Tensor,
        uses_batch: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        line, of_weight, of_bias = compute["grads_of_norm"](
            grad, sums, factor, term, False, mean, inverse, scale, weight, uses_batch
        )
        made = compute["grads_of_sums"](grad, sums, factor, term, False, mean, *line)
        # Outputs of operators share no memory.
        return torch.empty_like(grad).copy_(made), of_weight.clone(), of_bias.clone()


register_products(backend, convolve_codes, multiply_codes, map_sums)
grads_of_convolution = register_gradients(backend)
register_norm(backend)
