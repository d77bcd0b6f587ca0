"""The ranges of groups (the whole tensor, or each channel), their averages, and the levels that a
range and a grid define."""

from collections.abc import Callable

import torch
from torch import Tensor

from noisyq_fast.grid import ODD, Grid

FLT_MIN = torch.finfo(torch.float32).tiny


def absmax_of(x: Tensor, axis: int | None) -> Tensor:
    """lambda: the largest magnitude of each group, in float32; 0 for a group without elements."""
    return _reduced(lambda x, axes: x.abs().amax(axes), x, axis)


def range_of(x: Tensor, grid: Grid, axis: int | None) -> Tensor:
    """The range of each group, in float32: the absmax; on an unsigned grid max(x, 0); on an affine
    grid min(x, 0) and max(x, 0), stacked. max(x, 0) is NaN if min(x, 0) is not finite."""
    if not grid.is_unsigned:
        return absmax_of(x, axis)
    low = _reduced(Tensor.amin, x, axis).clamp(max=0)
    high = _reduced(Tensor.amax, x, axis).clamp(min=0).masked_fill(~low.isfinite(), torch.nan)
    return torch.stack([low, high]) if grid.is_affine else high


def average_(
    running_range: Tensor,
    observed: Tensor | None,
    batch: Tensor,
    averaging_constant: float,
    is_affine: bool = False,
) -> None:
    """Moves the average, ``running_range / observed``, towards the batch's range. An average
    that is NaN is set to it; a range that is not finite changes nothing."""
    known = running_range if observed is None else running_range / observed
    averaged = torch.where(known.isnan(), batch, known + averaging_constant * (batch - known))
    is_observation = (batch[1] - batch[0] if is_affine else batch).isfinite()
    running_range.copy_(torch.where(is_observation, averaged, running_range))
    if observed is not None:
        observed.masked_fill_(is_observation, 1.0)


class Levels:
    """The rounding of each group: y = clamp(rounded(x), low, high) * scale, and the code is
    clamp(...) + zero. Scales and zeros are float32."""

    @classmethod
    def of_range(cls, range_: Tensor, grid: Grid) -> "Levels":
        if grid.is_affine:
            low, high = range_[0].clamp(max=0), range_[1].clamp(min=0)  # so that it holds 0
            scale = _scale(high - low, grid.divisor)
            return cls(scale, (-low / scale).round().nan_to_num(nan=0.0), grid)
        scale = _scale(range_, grid.divisor)
        return cls(scale, torch.zeros_like(scale), grid)

    def __init__(self, scale: Tensor, zero: Tensor, grid: Grid) -> None:
        self.scale, self.zero, self.grid = scale, zero, grid
        if grid.kind == ODD:  # elsewhere an infinite scale times the code 0 is NaN
            self.scale = self.scale.masked_fill(self.scale.isinf(), torch.nan)
        self.low, self.high = grid.code_min - self.zero, grid.code_max - self.zero

    def rounded(self, x: Tensor, axis: int | None) -> Tensor:
        quotient = x.float() / along_axis(self.scale, x, axis)
        if self.grid.kind != ODD:
            return quotient.round()
        return 2 * ((quotient + self.grid.code_max) / 2).round() - self.grid.code_max

    def clamped(self, x: Tensor, axis: int | None) -> Tensor:
        low, high = (along_axis(end, x, axis) for end in (self.low, self.high))
        return self.rounded(x, axis).clamp(low, high)

    def values(self, x: Tensor, axis: int | None) -> Tensor:
        values = self.clamped(x, axis) * along_axis(self.scale, x, axis)
        return torch.empty_like(x).copy_(values)

    def codes(self, x: Tensor, axis: int | None) -> Tensor:
        codes = self.clamped(x, axis) + along_axis(self.zero, x, axis)
        dtype = self.grid.code_dtype
        return torch.empty_like(x, dtype=dtype).copy_(codes.nan_to_num(nan=0.0))

    def is_clipped(self, x: Tensor, axis: int | None) -> Tensor:
        rounded = self.rounded(x, axis)
        low, high = (along_axis(end, x, axis) for end in (self.low, self.high))
        return (rounded < low) | (rounded > high)


def _scale(width: Tensor, divisor: float) -> Tensor:
    # Divided by a tensor: on CUDA, PyTorch turns division by a number into multiplication by its
    # reciprocal. And maximum() keeps a NaN.
    scale = width / torch.full_like(width, divisor)
    return scale.maximum(torch.full_like(scale, FLT_MIN))


def scale_of_codes(x: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    """The scale of codes; NaN if the group holds a NaN, which has no code."""
    axis = None if axis is None else axis % x.dim()
    return scale.masked_fill(_reduced(Tensor.amax, x, axis).isnan(), torch.nan)


def _reduced(reduce: Callable, x: Tensor, axis: int | None) -> Tensor:
    """A reduction of each group, in float32; 0 for a group without elements."""
    shape = [] if axis is None else [x.shape[axis]]
    if x.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    others = [d for d in range(x.dim()) if d != axis]
    return (reduce(x, others) if others else reduce(x.unsqueeze(0), 0)).float().reshape(shape)


def along_axis(per_channel: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return per_channel
    return per_channel.reshape([-1 if d == axis else 1 for d in range(x.dim())])
