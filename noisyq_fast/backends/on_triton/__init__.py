"""The Triton kernels (`kernels`, `masked`), launched on dense memory.

With ``TRITON_INTERPRET=1`` in the environment they run in NumPy, on the CPU too. That is for tests
without a GPU and very slow, so this backend then has to be asked for by name.
"""

import os
from functools import cache
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from noisyq_fast.backends import reference
from noisyq_fast.backends.backend import Backend
from noisyq_fast.backends.kernel_arguments import (
    channel_layout,
    contiguous,
    dense,
    launch_failed,
    write_back,
)
from noisyq_fast.backends.on_triton.tiling import (
    TileLimits,
    Tiling,
    absmax_tiling,
    map_tiling,
)
from noisyq_fast.backends.reference import CLIPPED, FLT_MIN, NOTHING
from noisyq_fast.grid import AFFINE, SIGNED, Grid
from noisyq_fast.operators import checks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Their arguments take less than 4 KB, the limit of older drivers, and a kernel for them is compiled
# in seconds.
_TENSORS_PER_LAUNCH = 64


def unavailable() -> str | None:
    if not INTERPRETED and not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    try:
        import triton

        if not INTERPRETED:
            _ = triton.runtime.driver.active  # Compiled when first used: needs a C compiler.
    except Exception as error:
        return f"Triton does not work ({error})"
    return None


backend = Backend(
    "triton",
    device_types=("cuda", "cpu") if INTERPRETED else ("cuda",),
    unavailable=unavailable,
    automatic=not INTERPRETED,
)


# On the signed grid.


@backend.register
def fake_quantize(x: Tensor, qmax: int, axis: int | None) -> Tensor:
    (y,) = fake_quantize_many([x], [qmax], [axis])
    return y


@backend.register
def fake_quantize_many(
    tensors: list[Tensor], qmaxes: list[int], axes: list[int | None]
) -> list[Tensor]:
    rows = [
        _Row(*dense(x), qmax, axis) for x, qmax, axis in zip(tensors, qmaxes, axes, strict=True)
    ]
    _quantize(rows)
    return [row.y for row in rows if row.y is not None]


@backend.register
def fake_quantize_ema(
    x: Tensor,
    running_absmax: Tensor,
    observed: Tensor | None,
    qmax: int,
    axis: int | None,
    averaging_constant: float,
) -> Tensor:
    x, y = dense(x)
    running, weight = running_absmax.contiguous(), contiguous(observed)
    _quantize([_Row(x, y, qmax, axis, running=running, observed=weight)], averaging_constant)
    write_back(running, running_absmax)
    write_back(weight, observed)
    return y


@backend.register
def fake_quantize_fixed_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize_fixed_range(x, absmax, SIGNED, qmax, axis)


@backend.register
def fake_quantize_fixed_range_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    x, y = dense(x)
    return y, _quantize_masked(_Row(x, y, qmax, axis), CLIPPED, absmax)


@backend.register
def zero_clipped(grad: Tensor, clipped: Tensor) -> Tensor:
    out = torch.empty_like(grad)
    _map(_masked_kernels().zero_clipped, grad, None, out, clipped.contiguous())
    return out


@backend.register
def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    x, codes = dense(x, torch.int8)
    scale = _for_each_channel(x, axis, torch.float32)
    if x.numel() == 0:
        scale.fill_(FLT_MIN)
    _quantize([_Row(x, codes, qmax, axis, scale=scale)])
    return codes, scale


@backend.register
def dequantize(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    return dequantize_on_grid(codes, scale, None, axis)


# On any grid.


@backend.register
def fake_quantize_on_grid(
    x: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor]:
    return _fake_quantize(x, grid, axis, masked)


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
    running, weight = running_range.contiguous(), contiguous(observed)
    outputs = _fake_quantize(x, grid, axis, masked, running, weight, averaging_constant)
    write_back(running, running_range)
    write_back(weight, observed)
    return outputs


@backend.register
def fake_quantize_fixed_range_on_grid(
    x: Tensor, range_: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor]:
    if masked == NOTHING:
        return _fake_quantize_fixed_range(x, range_, grid.kind, grid.qmax, axis), _no_mask(x)
    x, y = dense(x)
    return y, _quantize_masked(_Row(x, y, grid.qmax, axis, grid.kind), masked, range_)


@backend.register
def quantize_on_grid(x: Tensor, grid: Grid, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    row = _row_of_codes(x, grid, axis)
    _quantize_alone(row)
    return _written(row)


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
    running, weight = running_range.contiguous(), contiguous(observed)
    row = _row_of_codes(x, grid, axis)._replace(running=running, observed=weight)
    mask = _quantize_and_mask(row, masked, averaging_constant)
    write_back(running, running_range)
    write_back(weight, observed)
    return *_written(row), mask


@backend.register
def quantize_fixed_range_on_grid(
    x: Tensor, range_: Tensor, grid: Grid, axis: int | None, masked: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return reference.quantize_fixed_range_on_grid(x, range_, grid, axis, masked)
    row = _row_of_codes(x, grid, axis)
    y = row.y if masked == NOTHING else None
    arguments = range_.contiguous(), y, row.scale, row.zero, float(row.qmax), row.kind
    _map(_kernels().quantize_fixed_range, row.x, axis, *arguments)
    return *_written(row), _mask(row, masked)


@backend.register
def dequantize_on_grid(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None
) -> Tensor:
    codes, y = dense(codes, torch.float32)
    _map(_kernels().dequantize, codes, axis, scale.contiguous(), contiguous(zero_point), y)
    return y


# Launches.


class _Row(NamedTuple):
    """A tensor to quantize by its own range, into ``y``, and what else is to be written of it."""

    x: Tensor
    y: Tensor | None
    qmax: int
    axis: int | None
    kind: str = SIGNED
    scale: Tensor | None = None
    zero: Tensor | None = None
    running: Tensor | None = None
    observed: Tensor | None = None

    @property
    def tiling(self) -> Tiling:
        layout = channel_layout(self.x, self.axis)
        return absmax_tiling(layout, self.x.element_size(), _limits(self.x.device))


def _fake_quantize(
    x: Tensor,
    grid: Grid,
    axis: int | None,
    masked: str,
    running: Tensor | None = None,
    observed: Tensor | None = None,
    averaging_constant: float = 0.0,
) -> tuple[Tensor, Tensor]:
    x, y = dense(x)
    row = _Row(x, y, grid.qmax, axis, grid.kind, running=running, observed=observed)
    if masked != NOTHING:
        scale, zero = (_for_each_channel(x, axis, dtype) for dtype in (torch.float32, torch.uint8))
        row = row._replace(scale=scale, zero=zero)
    return y, _quantize_and_mask(row, masked, averaging_constant)


def _row_of_codes(x: Tensor, grid: Grid, axis: int | None) -> _Row:
    """With room for codes, their scales and their zero points."""
    x, codes = dense(x, grid.code_dtype)
    scale, zero = (_for_each_channel(x, axis, dtype) for dtype in (torch.float32, torch.uint8))
    if x.numel() == 0:
        scale.fill_(FLT_MIN)
        zero.zero_()
    return _Row(x, codes, grid.qmax, axis, grid.kind, scale=scale, zero=zero)


def _written(row: _Row) -> tuple[Tensor, Tensor, Tensor]:
    """The codes, their scales and their zero points."""
    assert row.y is not None
    assert row.scale is not None
    assert row.zero is not None
    return row.y, row.scale, row.zero


def _quantize_and_mask(row: _Row, masked: str, averaging_constant: float) -> Tensor:
    # First the scales: the bits of a mask lie in the order of memory, and a channel may not.
    y = row.y if masked == NOTHING else None
    _quantize_alone(row._replace(y=y), averaging_constant)
    return _mask(row, masked)


def _mask(row: _Row, masked: str) -> Tensor:
    return _no_mask(row.x) if masked == NOTHING else _quantize_masked(row, masked)


def _quantize(rows: list[_Row], averaging_constant: float = 0.0) -> None:
    """On the signed grid: in one launch all tensors whose channels no programs share, in two
    launches each other."""
    together = []
    for row in rows:
        if row.x.numel() == 0:
            continue
        tiling = row.tiling
        if tiling.splits == 1:
            together.append((row, tiling))
        else:
            _quantize_shared(row, tiling, averaging_constant)
    for start in range(0, len(together), _TENSORS_PER_LAUNCH):
        _quantize_channels(together[start : start + _TENSORS_PER_LAUNCH], averaging_constant)


def _quantize_alone(row: _Row, averaging_constant: float = 0.0) -> None:
    """On any grid."""
    if row.x.numel() == 0:
        return
    tiling = row.tiling
    if tiling.splits == 1:
        is_on_chip = tiling.tiles == 1
        arguments = _outputs(row, averaging_constant)
        _launch_tiled(_kernels().quantize_tensor, tiling, row.x, *arguments, is_on_chip)
    else:
        _quantize_shared(row, tiling, averaging_constant)


def _quantize_channels(together: list[tuple[_Row, Tiling]], averaging_constant: float) -> None:
    rows, tilings = zip(*together, strict=True)
    *firsts, programs = accumulate((tiling.channel_tiles for tiling in tilings), initial=0)
    _launch(
        rows[0].x,
        _kernels().quantize_channels,
        (programs,),
        max(tiling.warps for tiling in tilings),
        tuple(row.x for row in rows),
        tuple(row.y for row in rows),
        tuple(row.scale for row in rows),
        tuple(row.running for row in rows),
        tuple(row.observed for row in rows),
        averaging_constant,
        tuple(float(row.qmax) for row in rows),
        tuple((*tiling.layout, first) for tiling, first in zip(tilings, firsts, strict=True)),
        tuple(tiling.tile for tiling in tilings),
        tuple(tiling.tiles == 1 for tiling in tilings),
    )


def _quantize_shared(row: _Row, tiling: Tiling, averaging_constant: float) -> None:
    _, channels, _ = tiling.layout
    rows = tiling.splits * (2 if row.kind == AFFINE else 1)
    partial = torch.empty(rows, channels, dtype=torch.int32, device=row.x.device)
    _launch_tiled(_kernels().reduce_partially, tiling, row.x, partial, row.kind)
    arguments = partial, *_outputs(row, averaging_constant)
    _launch_tiled(_kernels().quantize_reduced, tiling, row.x, *arguments)


def _outputs(row: _Row, averaging_constant: float) -> tuple:
    """The arguments of a kernel, from ``y`` to ``KIND``."""
    _, y, qmax, _, kind, *written = row
    return y, *written, averaging_constant, float(qmax), kind


def _fake_quantize_fixed_range(
    x: Tensor, range_: Tensor, kind: str, qmax: int, axis: int | None
) -> Tensor:
    x, y = dense(x)
    arguments = range_.contiguous(), y, None, None, float(qmax), kind
    _map(_kernels().quantize_fixed_range, x, axis, *arguments)
    return y


def _quantize_masked(row: _Row, masked: str, range_: Tensor | None = None) -> Tensor:
    """The mask. By the range, if one is given, or else by the scale and the zero point."""
    x, y, qmax, axis, kind, scale, zero, *_ = row
    mask = x.new_empty(checks.packed_size(x), dtype=torch.uint8)
    if x.numel() > 0:
        _, channels, inner = channel_layout(x, axis)
        levels = contiguous(range_), scale, zero
        walk = channels, None if channels == 1 else inner
        arguments = *levels, y, mask, float(qmax), kind, masked, *walk
        tiling = _map_tiling(x, None)
        # Each element of several channels has levels of its own, in registers.
        warps = tiling.warps * (1 if channels == 1 else 2)
        _launch_tiled(_masked_kernels().quantize_masked, tiling, x, *arguments, warps=warps)
    return mask


def _no_mask(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.uint8)


def _for_each_channel(x: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty([] if axis is None else [x.shape[axis]], dtype=dtype)


def _map(kernel: Any, x: Tensor, axis: int | None, *arguments: object) -> None:
    if x.numel() > 0:
        _launch_tiled(kernel, _map_tiling(x, axis), x, *arguments)


def _map_tiling(x: Tensor, axis: int | None) -> Tiling:
    layout = channel_layout(x, axis)
    return map_tiling(layout, x.element_size(), _limits(x.device))


def _launch_tiled(
    kernel: Any, tiling: Tiling, x: Tensor, *arguments: object, warps: int | None = None
) -> None:
    sizes = (*tiling.layout, None)
    _launch(x, kernel, tiling.grid, warps or tiling.warps, x, *arguments, sizes, tiling.tile)


def _launch(x: Tensor, kernel: Any, grid: tuple[int, ...], warps: int, *arguments: object) -> None:
    """On the device of ``x``."""
    with torch.cuda.device_of(x):
        try:
            kernel[grid](*arguments, num_warps=warps, enable_fp_fusion=False)
        except Exception as error:
            raise launch_failed(kernel.fn.__name__, x, error) from error


@cache
def _kernels() -> ModuleType:
    """Imported when first needed: most processes that import the package have no GPU."""
    from noisyq_fast.backends.on_triton import kernels

    return kernels


@cache
def _masked_kernels() -> ModuleType:
    from noisyq_fast.backends.on_triton import masked

    return masked


@cache
def _limits(device: torch.device) -> TileLimits:
    if device.type == "cpu":
        return TileLimits(processors=1)
    return TileLimits(torch.cuda.get_device_properties(device).multi_processor_count)
