"""The Triton kernels (`triton_kernels`, `triton_delayed`), launched on dense memory.

With ``TRITON_INTERPRET=1`` in the environment they run in NumPy, on the CPU too. That is for tests
without a GPU and very slow, so this backend then has to be asked for by name.
"""

import os
from dataclasses import replace
from functools import cache
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from noisyq_fast import checks
from noisyq_fast.backends import geometry, native
from noisyq_fast.backends.layout import channel_layout
from noisyq_fast.backends.progress import progress
from noisyq_fast.backends.reference import FLT_MIN

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICE_TYPES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
AUTOMATIC = not INTERPRETED

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


def fake_quantize(x: Tensor, qmax: int, axis: int | None) -> Tensor:
    (y,) = fake_quantize_many([x], [qmax], [axis])
    return y


def fake_quantize_many(
    tensors: list[Tensor], qmaxes: list[int], axes: list[int | None]
) -> list[Tensor]:
    rows = [
        _Row(*native.dense(x), qmax, axis)
        for x, qmax, axis in zip(tensors, qmaxes, axes, strict=True)
    ]
    _quantize(rows)
    return [row.y for row in rows]


def fake_quantize_ema(
    x: Tensor, running_absmax: Tensor, qmax: int, axis: int | None, averaging_constant: float
) -> Tensor:
    x, y = native.dense(x)
    running = running_absmax.contiguous()
    _quantize([_Row(x, y, qmax, axis, running=running)], averaging_constant)
    native.write_back(running_absmax, running)
    return y


def fake_quantize_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    x, y = native.dense(x)
    _map(_kernels().quantize_given, x, axis, absmax.contiguous(), y, float(qmax))
    return y


def fake_quantize_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    x, y = native.dense(x)
    return y, _clipped(x, absmax.contiguous(), y, qmax, axis)


def fake_quantize_delayed(
    x: Tensor,
    running_absmax: Tensor,
    qmax: int,
    axis: int | None,
    averaging_constant: float,
    save_clipped: bool,
) -> tuple[Tensor, Tensor]:
    x, y = native.dense(x, in_place=False)
    if x.numel() == 0:
        return y, x.new_empty(0, dtype=torch.uint8)
    tiling = _map_tiling(x, axis)
    outer, channels, inner = tiling.layout
    running = running_absmax.contiguous()
    # Otherwise eight elements side by side belong to several ranges: a launch for the bits alone.
    fused = save_clipped and (outer * channels == 1 or inner % 8 == 0)
    if fused:
        clipped = x.new_empty(checks.packed_size(x), dtype=torch.uint8)
        # At least the elements of a byte, where the tensor has fewer.
        outer_tile, channel_tile, inner_tile = tiling.tile
        tiling = replace(tiling, tile=(outer_tile, channel_tile, max(inner_tile, 8)))
    elif save_clipped:
        clipped = _clipped(x, running, None, qmax, axis)
    else:
        clipped = x.new_empty(0, dtype=torch.uint8)
    counts = progress(x.device, channels + tiling.channel_tiles)
    outputs = y, clipped if fused else None, counts, running
    kernel = _delayed_kernels().quantize_delayed
    _launch_tiled(kernel, tiling, x, *outputs, averaging_constant, float(qmax))
    native.write_back(running_absmax, running)
    return y, clipped


def zero_clipped(grad: Tensor, clipped: Tensor) -> Tensor:
    out = torch.empty_like(grad)
    _map(_delayed_kernels().zero_clipped, grad, None, out, clipped)
    return out


def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    x, codes = native.dense(x, torch.int8)
    scale = x.new_empty([] if axis is None else [x.shape[axis]], dtype=torch.float32)
    if x.numel() == 0:
        scale.fill_(FLT_MIN)
    _quantize([_Row(x, codes, qmax, axis, scale=scale)])
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    codes, y = native.dense(codes, torch.float32)
    _map(_kernels().dequantize, codes, axis, scale.contiguous(), y)
    return y


class _Row(NamedTuple):
    """A tensor to quantize by its own absmax, into ``y``."""

    x: Tensor
    y: Tensor
    qmax: int
    axis: int | None
    scale: Tensor | None = None
    running: Tensor | None = None


def _quantize(rows: list[_Row], averaging_constant: float = 0.0) -> None:
    """In one launch all tensors whose channels no programs share, in two launches each other."""
    together = []
    for row in rows:
        if row.x.numel() == 0:
            continue
        layout = channel_layout(row.x, row.axis)
        tiling = geometry.absmax_tiling(layout, row.x.element_size(), _machine(row.x.device))
        if tiling.splits == 1:
            together.append((row, tiling))
        else:
            _quantize_shared(row, tiling, averaging_constant)
    for start in range(0, len(together), _TENSORS_PER_LAUNCH):
        _quantize_channels(together[start : start + _TENSORS_PER_LAUNCH], averaging_constant)


def _quantize_channels(
    together: list[tuple[_Row, geometry.Tiling]], averaging_constant: float
) -> None:
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
        averaging_constant,
        tuple(float(row.qmax) for row in rows),
        tuple((*tiling.layout, first) for tiling, first in zip(tilings, firsts, strict=True)),
        tuple(tiling.tile for tiling in tilings),
        tuple(tiling.tiles == 1 for tiling in tilings),
    )


def _quantize_shared(row: _Row, tiling: geometry.Tiling, averaging_constant: float) -> None:
    x, y, qmax, _, scale, running = row
    _, channels, _ = tiling.layout
    partial = torch.empty(tiling.splits, channels, dtype=torch.int32, device=x.device)
    outputs = y, scale, running, averaging_constant, float(qmax)
    _launch_tiled(_kernels().reduce_partially, tiling, x, partial)
    _launch_tiled(_kernels().quantize_reduced, tiling, x, partial, *outputs)


def _clipped(x: Tensor, absmax: Tensor, y: Tensor | None, qmax: int, axis: int | None) -> Tensor:
    """The bits of clipped elements; writes the quantized values to ``y``, where it is not None."""
    clipped = x.new_empty(checks.packed_size(x), dtype=torch.uint8)
    _, channels, inner = channel_layout(x, axis)
    arguments = absmax, y, clipped, float(qmax), channels, inner
    _map(_delayed_kernels().quantize_clipped, x, None, *arguments)
    return clipped


def _map(kernel: Any, x: Tensor, axis: int | None, *arguments: object) -> None:
    if x.numel() > 0:
        _launch_tiled(kernel, _map_tiling(x, axis), x, *arguments)


def _map_tiling(x: Tensor, axis: int | None) -> geometry.Tiling:
    layout = channel_layout(x, axis)
    return geometry.map_tiling(layout, x.element_size(), _machine(x.device))


def _launch_tiled(kernel: Any, tiling: geometry.Tiling, x: Tensor, *arguments: object) -> None:
    sizes = (*tiling.layout, None)
    _launch(x, kernel, tiling.grid, tiling.warps, x, *arguments, sizes, tiling.tile)


def _launch(x: Tensor, kernel: Any, grid: tuple[int, ...], warps: int, *arguments: object) -> None:
    """On the device of ``x``."""
    with torch.cuda.device_of(x):
        try:
            kernel[grid](*arguments, num_warps=warps, enable_fp_fusion=False)
        except Exception as error:
            raise native.launch_failed(kernel.fn.__name__, x, error) from error


@cache
def _kernels() -> ModuleType:
    """Imported when first needed: most processes that import the package have no GPU."""
    from noisyq_fast.backends import triton_kernels

    return triton_kernels


@cache
def _delayed_kernels() -> ModuleType:
    from noisyq_fast.backends import triton_delayed

    return triton_delayed


@cache
def _machine(device: torch.device) -> geometry.Machine:
    if device.type == "cpu":
        return geometry.Machine(processors=1)
    return geometry.Machine(torch.cuda.get_device_properties(device).multi_processor_count)
