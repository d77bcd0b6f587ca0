"""The executable specification, in plain PyTorch, for every device.

Other backends equal it to the last bit, so a change here changes all results.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from noisyq_fast.backends.backend import Backend
from noisyq_fast.grid import ODD, UNSIGNED, Grid
from noisyq_fast.grid import grid as grid_of

NOTHING, NEGATIVE, CLIPPED = MASKED = ("nothing", "negative", "clipped")
"""Which elements have no gradient: none, those below 0, or those that are clipped (on an unsigned
grid those below 0 too)."""

FLT_MIN = torch.finfo(torch.float32).tiny


backend = Backend("reference", device_types=None, unavailable=lambda: None)


# On the signed grid.


@backend.register
def fake_quantize(x: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize(x, absmax_of(x, axis), _signed(qmax), axis)


@backend.register
def fake_quantize_many(
    tensors: list[Tensor], qmaxes: list[int], axes: list[int | None]
) -> list[Tensor]:
    return [fake_quantize(*arguments) for arguments in zip(tensors, qmaxes, axes, strict=True)]


@backend.register
def fake_quantize_ema(
    x: Tensor,
    running_absmax: Tensor,
    observed: Tensor | None,
    qmax: int,
    axis: int | None,
    averaging_constant: float,
) -> Tensor:
    absmax = absmax_of(x, axis)
    if x.numel() > 0:
        average_(running_absmax, observed, absmax, averaging_constant)
    return _fake_quantize(x, absmax, _signed(qmax), axis)


@backend.register
def fake_quantize_fixed_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize(x, absmax, _signed(qmax), axis)


@backend.register
def fake_quantize_fixed_range_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    grid = _signed(qmax)
    return _fake_quantize(x, absmax, grid, axis), _mask(x, absmax, grid, axis, CLIPPED)


@backend.register
def zero_clipped(grad: Tensor, clipped: Tensor) -> Tensor:
    return torch.empty_like(grad).copy_(grad.masked_fill(unpack(clipped, grad), 0))


@backend.register
def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    codes, scale, _ = quantize_on_grid(x, _signed(qmax), axis)
    return codes, scale


@backend.register
def dequantize(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    return dequantize_on_grid(codes, scale, None, axis)


# On any grid. `masked` says which elements have no gradient; the second output has one bit per
# element, set for these (`pack`).


@backend.register
def fake_quantize_on_grid(
    x: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor]:
    return fake_quantize_fixed_range_on_grid(x, range_of(x, grid, axis), grid, axis, masked)


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
    batch = range_of(x, grid, axis)
    if x.numel() > 0:
        average_(running_range, observed, batch, averaging_constant, grid.is_affine)
    return fake_quantize_fixed_range_on_grid(x, batch, grid, axis, masked)


@backend.register
def fake_quantize_fixed_range_on_grid(
    x: Tensor, range_: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor]:
    return _fake_quantize(x, range_, grid, axis), _mask(x, range_, grid, axis, masked)


@backend.register
def quantize_on_grid(x: Tensor, grid: Grid, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_fixed_range_on_grid(x, range_of(x, grid, axis), grid, axis, NOTHING)[:3]


@backend.register
def quantize_ema_on_grid(
    x: Tensor,
    running_range: Tensor,
    observed: Tensor | None,
    grid: Grid,
    axis: int | None,
    averaging_constant: float,
    masked: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = range_of(x, grid, axis)
    if x.numel() > 0:
        average_(running_range, observed, batch, averaging_constant, grid.is_affine)
    return quantize_fixed_range_on_grid(x, batch, grid, axis, masked)


@backend.register
def quantize_fixed_range_on_grid(
    x: Tensor, range_: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    levels = Levels.of_range(range_, grid)
    mask = _mask(x, range_, grid, axis, masked)
    return levels.codes(x, axis), levels.scale, levels.zero.to(torch.uint8), mask


def scale_of_codes(x: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    """The scale of codes; NaN if the group holds a NaN, which has no code."""
    axis = None if axis is None else axis % x.dim()
    return scale.masked_fill(_reduced(Tensor.amax, x, axis).isnan(), torch.nan)


@backend.register
def dequantize_on_grid(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None
) -> Tensor:
    steps = codes.float()
    if zero_point is not None:
        steps = steps - _along_axis(zero_point, codes, axis)
    values = steps * _along_axis(scale, codes, axis)
    return torch.empty_like(codes, dtype=torch.float32).copy_(values)


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


def _signed(qmax: int) -> Grid:
    return grid_of(qmax.bit_length() + 1)


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
        quotient = x.float() / _along_axis(self.scale, x, axis)
        if self.grid.kind != ODD:
            return quotient.round()
        return 2 * ((quotient + self.grid.code_max) / 2).round() - self.grid.code_max

    def clamped(self, x: Tensor, axis: int | None) -> Tensor:
        low, high = (_along_axis(end, x, axis) for end in (self.low, self.high))
        return self.rounded(x, axis).clamp(low, high)

    def values(self, x: Tensor, axis: int | None) -> Tensor:
        values = self.clamped(x, axis) * _along_axis(self.scale, x, axis)
        return torch.empty_like(x).copy_(values)

    def codes(self, x: Tensor, axis: int | None) -> Tensor:
        codes = self.clamped(x, axis) + _along_axis(self.zero, x, axis)
        dtype = self.grid.code_dtype
        return torch.empty_like(x, dtype=dtype).copy_(codes.nan_to_num(nan=0.0))

    def is_clipped(self, x: Tensor, axis: int | None) -> Tensor:
        rounded = self.rounded(x, axis)
        low, high = (_along_axis(end, x, axis) for end in (self.low, self.high))
        return (rounded < low) | (rounded > high)


def _scale(width: Tensor, divisor: float) -> Tensor:
    # Divided by a tensor: on CUDA, PyTorch turns division by a number into multiplication by its
    # reciprocal. And maximum() keeps a NaN.
    scale = width / torch.full_like(width, divisor)
    return scale.maximum(torch.full_like(scale, FLT_MIN))


def _fake_quantize(x: Tensor, range_: Tensor, grid: Grid, axis: int | None) -> Tensor:
    return Levels.of_range(range_, grid).values(x, axis)


def _mask(x: Tensor, range_: Tensor, grid: Grid, axis: int | None, masked: str) -> Tensor:
    if masked == NOTHING:
        return x.new_empty(0, dtype=torch.uint8)
    if masked == NEGATIVE:
        mask = x < 0
    else:
        mask = Levels.of_range(range_, grid).is_clipped(x, axis)
        if grid.kind == UNSIGNED:
            mask |= x < 0
    return pack_like(x, mask)


def _reduced(reduce: Callable, x: Tensor, axis: int | None) -> Tensor:
    """A reduction of each group, in float32; 0 for a group without elements."""
    shape = [] if axis is None else [x.shape[axis]]
    if x.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    others = [d for d in range(x.dim()) if d != axis]
    return (reduce(x, others) if others else reduce(x.unsqueeze(0), 0)).float().reshape(shape)


def _along_axis(per_channel: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return per_channel
    return per_channel.reshape([-1 if d == axis else 1 for d in range(x.dim())])


# One bit for each element of a dense tensor, in the order of its memory, eight to a byte.


def pack(mask: Tensor) -> Tensor:
    """The uint8 bytes of a dense bool tensor; the first element is the lowest bit.

    Example:
        >>> import torch
        >>> pack(torch.tensor([True, False, True] + 6 * [False]))
        tensor([5, 0], dtype=torch.uint8)
    """
    flat = mask.as_strided((mask.numel(),), (1,))
    return packed(F.pad(flat, (0, -mask.numel() % 8)))


def pack_like(x: Tensor, mask: Tensor) -> Tensor:
    """The bytes of a mask in the order of the memory of ``x``."""
    return pack(torch.empty_like(x, dtype=torch.bool).copy_(mask))


def unpack(bytes_: Tensor, like: Tensor) -> Tensor:
    """The bool tensor that was packed, laid out like the dense tensor ``like``."""
    return unpacked(bytes_)[: like.numel()].as_strided(like.shape, like.stride())


def packed(bits: Tensor) -> Tensor:
    """Packs the last axis, whose size is a multiple of 8, into bytes."""
    eights = bits.to(torch.uint8).unflatten(-1, (bits.shape[-1] // 8, 8))
    return (eights << _positions(bits)).sum(-1, dtype=torch.uint8)


def unpacked(bytes_: Tensor) -> Tensor:
    return (bytes_.unsqueeze(-1) >> _positions(bytes_) & 1).flatten(-2).bool()


def _positions(x: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=x.device)
