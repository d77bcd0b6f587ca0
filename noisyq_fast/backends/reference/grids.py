"""Quantization on grids."""

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.reference.levels import Levels, absmax_of, along_axis, average_, range_of
from noisyq_fast.backends.reference.masks import CLIPPED, NEGATIVE, NOTHING, pack_like, unpack
from noisyq_fast.grid import UNSIGNED, Grid
from noisyq_fast.grid import grid as grid_of

operators = Operators()


# On the signed grid.


@operators.register
def fake_quantize(x: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize(x, absmax_of(x, axis), _signed(qmax), axis)


@operators.register
def fake_quantize_many(
    tensors: list[Tensor], qmaxes: list[int], axes: list[int | None]
) -> list[Tensor]:
    return [fake_quantize(*arguments) for arguments in zip(tensors, qmaxes, axes, strict=True)]


@operators.register
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


@operators.register
def fake_quantize_fixed_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize(x, absmax, _signed(qmax), axis)


@operators.register
def fake_quantize_fixed_range_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    grid = _signed(qmax)
    return _fake_quantize(x, absmax, grid, axis), _mask(x, absmax, grid, axis, CLIPPED)


@operators.register
def zero_clipped(grad: Tensor, clipped: Tensor) -> Tensor:
    return torch.empty_like(grad).copy_(grad.masked_fill(unpack(clipped, grad), 0))


@operators.register
def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    codes, scale, _ = quantize_on_grid(x, _signed(qmax), axis)
    return codes, scale


@operators.register
def dequantize(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    return dequantize_on_grid(codes, scale, None, axis)


# On any grid. `masked` says which elements have no gradient; the second output has one bit per
# element, set for these (`pack`).


@operators.register
def fake_quantize_on_grid(
    x: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor]:
    return fake_quantize_fixed_range_on_grid(x, range_of(x, grid, axis), grid, axis, masked)


@operators.register
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


@operators.register
def fake_quantize_fixed_range_on_grid(
    x: Tensor, range_: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor]:
    return _fake_quantize(x, range_, grid, axis), _mask(x, range_, grid, axis, masked)


@operators.register
def quantize_on_grid(x: Tensor, grid: Grid, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_fixed_range_on_grid(x, range_of(x, grid, axis), grid, axis, NOTHING)[:3]


@operators.register
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


@operators.register
def quantize_fixed_range_on_grid(
    x: Tensor, range_: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    levels = Levels.of_range(range_, grid)
    mask = _mask(x, range_, grid, axis, masked)
    return levels.codes(x, axis), levels.scale, levels.zero.to(torch.uint8), mask


@operators.register
def dequantize_on_grid(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None
) -> Tensor:
    steps = codes.float()
    if zero_point is not None:
        steps = steps - along_axis(zero_point, codes, axis)
    values = steps * along_axis(scale, codes, axis)
    return torch.empty_like(codes, dtype=torch.float32).copy_(values)


def _signed(qmax: int) -> Grid:
    return grid_of(qmax.bit_length() + 1)


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
