"""Passes over the sums of products of codes: batch norm, ReLU and addition, and codes again.

Sums, v, are float32, or int16 if that is wide enough, ``[N, C, ...]`` or ``[N, C]``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.reference.grids import quantize_fixed_range_on_grid
from noisyq_fast.backends.reference.levels import average_
from noisyq_fast.backends.reference.masks import NOTHING, pack
from noisyq_fast.grid import Grid

operators = Operators()


@operators.register
def moments(sums: Tensor, bound: int) -> tuple[Tensor, ...]:
    """``sums`` in their stored dtype, and for each channel the sum of v, the sum of v^2 as a pair
    of its upper and lower 32 bits, the smallest and the largest v."""
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
    """Running statistics of a batch norm, of ``v * scale + bias``, and the number of batches."""

    mean: Tensor
    variance: Tensor
    batches: Tensor
    bias: Tensor | None
    momentum: float

    def is_plain(self) -> bool:
        """Whether a kernel can update them in place."""
        return all(x.dtype == torch.float32 and x.is_contiguous() for x in self[:2])


@operators.register
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
    """Batch norm of ``v * scale`` as ``v * factor + term``: factor, term, the mean of v, 1 /
    standard deviation, and in float64 the mean and the variance of ``v * scale``, with which
    ``running`` is updated. Equations: `noisyq_fast.integer.batch_norm`."""
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


@operators.register
def ends_of_line(low: Tensor, high: Tensor, factor: Tensor, term: Tensor, relu: bool) -> Tensor:
    """`ends` of ``relu(v * factor + term)``, from the smallest and the largest v of each channel:
    rounding is monotone."""
    low, high = (end * factor + term for end in (low, high))
    low, high = torch.minimum(low, high).amin(), torch.maximum(low, high).amax()
    return range_between(low.clamp(min=0) if relu else low, high)


@operators.register
def observe(
    ends: Tensor, running: Tensor, observed: Tensor, averaging_constant: float, grid: Grid
) -> Tensor:
    """The range, per tensor, of a batch with these `ends`. Moves the average towards it."""
    batch = range_of_ends(ends, grid)
    average_(running, observed, batch, averaging_constant, grid.is_affine)
    return batch


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
    """y = relu(v * factor + term + residual), each operation rounded once, without ReLU or residual
    if there is none; one bit per y, set if it is not above 0; and min(y, 0) and max(y, 0)."""
    y = sums.float() * along_channels(factor, sums) + along_channels(term, sums)
    if residual is not None:
        y = y + residual
    if relu:
        y = torch.where(y < 0, 0, y)
    y = torch.empty_like(sums, dtype=torch.float32).copy_(y)
    zeros = pack(torch.empty_like(y, dtype=torch.bool).copy_(~(y > 0))) if wants_zeros else None
    return y, zeros, ends(y) if wants_range else None


@operators.register
def codes_of_sums(
    sums: Tensor, factor: Tensor, term: Tensor, relu: bool, range_: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of ``relu(v * factor + term)`` for a range, their scale and their zero point. The
    scale is NaN if a factor or a term is not finite."""
    y, _, _ = map_sums(sums, factor, term, None, relu, False, False)
    codes, scale, zero_point, _ = quantize_fixed_range_on_grid(y, range_, grid, None, NOTHING)
    return codes, scale_of_line(scale, factor, term), zero_point


def scale_of_line(scale: Tensor, factor: Tensor, term: Tensor) -> Tensor:
    # 0 times what is finite is 0.
    return scale + ((factor + term) * 0).sum()


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
    """The backward of a batch norm: for each channel ``slope``, ``shift`` and ``tilt`` for
    `grads_of_sums`, and the gradients of weight and bias. Sums are float64; in other backends equal
    up to their order."""
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
    """``slope * g - shift - (v - mean) * tilt``, in the dtype of the gradient."""
    mean, slope, shift, tilt = (along_channels(x, sums) for x in (mean, slope, shift, tilt))
    g = _behind(grad, sums, factor, term, relu)
    out = slope * g - shift - (sums.float() - mean) * tilt
    return torch.empty_like(sums, dtype=grad.dtype).copy_(out)


class GradOfSums(NamedTuple):
    """The arguments of `grads_of_sums`, from which the gradient can be computed later."""

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


def is_narrow(bound: int) -> bool:
    """Whether sums up to ``bound`` are stored as int16."""
    return bound < 2**15


def ends(y: Tensor) -> Tensor:
    """min(y, 0) and max(y, 0); the latter NaN if y holds a NaN or the former is not finite (the
    former is then unspecified)."""
    return y.new_zeros(2) if y.numel() == 0 else range_between(y.amin(), y.amax())


def range_between(low: Tensor, high: Tensor) -> Tensor:
    low, high = low.clamp(max=0), high.clamp(min=0)
    return torch.stack([low, high.masked_fill(~low.isfinite(), torch.nan)])


def range_of_ends(ends: Tensor, grid: Grid) -> Tensor:
    """As `levels.range_of`."""
    low, high = ends
    if grid.is_affine:
        return ends
    return high if grid.is_unsigned else torch.maximum(-low, high)


def channel_axis(sums: Tensor) -> int:
    return 1 if sums.dim() > 2 else -1


def by_channel(sums: Tensor) -> Tensor:
    return sums.movedim(channel_axis(sums), 0).flatten(1)


def along_channels(of_channel: Tensor, sums: Tensor) -> Tensor:
    return of_channel.reshape([-1, *[1] * (sums.dim() - 2)]) if sums.dim() > 2 else of_channel
