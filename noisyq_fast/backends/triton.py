"""The Triton kernels (`triton_kernels`, `triton_delayed`), launched on dense memory.

With ``TRITON_INTERPRET=1`` in the environment they run in NumPy, on the CPU too. That is for tests
without a GPU and very slow, so this backend then has to be asked for by name.
"""

import os
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from noisyq_fast import checks
from noisyq_fast.backends import geometry, native, packing, reference
from noisyq_fast.backends.layout import channel_layout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICE_TYPES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
AUTOMATIC = not INTERPRETED

FLT_MIN = torch.finfo(torch.float32).tiny


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
    x, y = native.dense(x)
    _quantize(x, y, qmax, axis)
    return y


def fake_quantize_many(
    tensors: list[Tensor], qmaxes: list[int], axes: list[int | None]
) -> list[Tensor]:
    return [fake_quantize(*arguments) for arguments in zip(tensors, qmaxes, axes, strict=True)]


def fake_quantize_ema(
    x: Tensor, running_absmax: Tensor, qmax: int, axis: int | None, averaging_constant: float
) -> Tensor:
    x, y = native.dense(x)
    running = running_absmax.contiguous()
    _quantize(x, y, qmax, axis, running=running, averaging_constant=averaging_constant)
    if running is running_absmax:
        torch.autograd.graph.increment_version(running)
    else:
        running_absmax.copy_(running)
    return y


def fake_quantize_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    x, y = native.dense(x)
    _map(_kernels().quantize_given, x, axis, absmax.contiguous(), y, None, float(qmax))
    return y


def fake_quantize_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    x, y = native.dense(x)
    clipped = torch.empty_like(y, dtype=torch.bool)
    _map(_kernels().quantize_given, x, axis, absmax.contiguous(), y, clipped, float(qmax))
    return y, packing.pack(clipped)


def fake_quantize_delayed(
    x: Tensor,
    running_absmax: Tensor,
    qmax: int,
    axis: int | None,
    averaging_constant: float,
    save_clipped: bool,
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0 or running_absmax.numel() > 1:
        # Of several ranges elements lie mixed in memory, and so would the bits of the clipped ones.
        return reference.fake_quantize_delayed(
            x, running_absmax, qmax, axis, averaging_constant, save_clipped
        )
    x, y = native.dense(x)
    clipped = x.new_empty(checks.packed_size(x), dtype=torch.uint8) if save_clipped else None
    tiling = geometry.map_tiling(channel_layout(x, None), x.element_size(), _machine(x.device))
    partial = torch.empty(tiling.splits + 1, dtype=torch.int32, device=x.device)
    arguments = x, y, clipped, partial, running_absmax, averaging_constant, float(qmax)
    _launch(_delayed_kernels().quantize_delayed, tiling, *arguments)
    _launch(_delayed_kernels().finish_delayed, tiling, *arguments)
    torch.autograd.graph.increment_version(running_absmax)
    return y, x.new_empty(0, dtype=torch.uint8) if clipped is None else clipped


def zero_clipped(grad: Tensor, clipped: Tensor) -> Tensor:
    out = torch.empty_like(grad)
    _map(_delayed_kernels().zero_clipped, grad, None, out, clipped)
    return out


def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    x, codes = native.dense(x, torch.int8)
    scale = x.new_empty([] if axis is None else [x.shape[axis]], dtype=torch.float32)
    if x.numel() == 0:
        scale.fill_(FLT_MIN)
    _quantize(x, codes, qmax, axis, scale=scale)
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    codes, y = native.dense(codes, torch.float32)
    _map(_kernels().dequantize, codes, axis, scale.contiguous(), y)
    return y


def _quantize(
    x: Tensor,
    y: Tensor,
    qmax: int,
    axis: int | None,
    scale: Tensor | None = None,
    running: Tensor | None = None,
    averaging_constant: float = 0.0,
) -> None:
    """``y`` = quantized ``x``: in one launch, or in two where programs share a channel."""
    if x.numel() == 0:
        return
    layout = channel_layout(x, axis)
    tiling = geometry.absmax_tiling(layout, x.element_size(), _machine(x.device))
    outputs = y, scale, running, averaging_constant, float(qmax)
    if tiling.tiles == 1:
        _launch(_kernels().quantize_on_chip, tiling, x, *outputs)
    elif tiling.splits == 1:
        _launch(_kernels().quantize_looped, tiling, x, *outputs)
    else:
        _, channels, _ = tiling.layout
        partial = torch.empty(tiling.splits, channels, dtype=torch.int32, device=x.device)
        _launch(_kernels().reduce_partially, tiling, x, partial)
        _launch(_kernels().quantize_reduced, tiling, x, partial, *outputs)


def _map(kernel: Any, x: Tensor, axis: int | None, *arguments: object) -> None:
    if x.numel() == 0:
        return
    layout = channel_layout(x, axis)
    tiling = geometry.map_tiling(layout, x.element_size(), _machine(x.device))
    _launch(kernel, tiling, x, *arguments)


def _launch(kernel: Any, tiling: geometry.Tiling, x: Tensor, *arguments: object) -> None:
    with torch.cuda.device_of(x):
        kernel[tiling.grid](
            x,
            *arguments,
            tiling.layout,
            tiling.tile,
            num_warps=tiling.warps,
            enable_fp_fusion=False,
        )


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
