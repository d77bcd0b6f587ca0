"""Launches of the Triton kernels, on dense memory."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from noisyq_fast.backends.kernel_arguments import channel_layout, launch_failed
from noisyq_fast.backends.on_triton.tiling import TileLimits, Tiling, map_tiling


def launch_map(kernel: Any, x: Tensor, axis: int | None, *arguments: object) -> None:
    if x.numel() > 0:
        launch_tiled(kernel, tiling_of_map(x, axis), x, *arguments)


def tiling_of_map(x: Tensor, axis: int | None) -> Tiling:
    layout = channel_layout(x, axis)
    return map_tiling(layout, x.element_size(), limits(x.device))


def launch_tiled(
    kernel: Any, tiling: Tiling, x: Tensor, *arguments: object, warps: int | None = None
) -> None:
    sizes = (*tiling.layout, None)
    launch(x, kernel, tiling.grid, warps or tiling.warps, x, *arguments, sizes, tiling.tile)


def launch(x: Tensor, kernel: Any, grid: tuple[int, ...], warps: int, *arguments: object) -> None:
    """Launches on the device of ``x``."""
    with torch.cuda.device_of(x):
        try:
            kernel[grid](*arguments, num_warps=warps, enable_fp_fusion=False)
        except Exception as error:
            raise launch_failed(kernel.fn.__name__, x, error) from error


@cache
def limits(device: torch.device) -> TileLimits:
    if device.type == "cpu":
        return TileLimits(processors=1)
    return TileLimits(torch.cuda.get_device_properties(device).multi_processor_count)
