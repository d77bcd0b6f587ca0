"""Launches of the CUDA kernels, on the current stream, with as many blocks as suit the device."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from noisyq_fast.backends.kernel_arguments import core, launch_failed
from noisyq_fast.backends.native_cuda.blocks import (
    DeviceLimits,
    resident_blocks,
    splits_of_map,
    splits_of_reduction,
)

Layout = tuple[int, int, int]

kernels: Any = getattr(core, "cuda", None)


def launch(kernel: str, x: Tensor, *arguments: object) -> None:
    """Runs a kernel on the device of ``x``, on its current stream."""
    with torch.cuda.device_of(x):
        try:
            getattr(kernels, kernel)(*arguments, _stream(x.device))
        except RuntimeError as error:
            raise launch_failed(kernel, x, error) from None


def splits_of(x: Tensor, layout: Layout) -> tuple[int, int]:
    """The numbers of blocks that share a channel in a reduction and in a map."""
    outer, channels, inner = layout
    arguments = outer * inner * x.element_size(), channels, _limits(x.device)
    return splits_of_reduction(*arguments), splits_of_map(*arguments)


def blocks_of(x: Tensor) -> int:
    """The number of blocks of a map over the memory in order, regardless of channels."""
    return splits_of_map(x.nbytes, 1, _limits(x.device))


def resident_blocks_of(x: Tensor) -> int | None:
    """The number of blocks that keep ``x`` on chip; ``None`` if it does not fit."""
    return resident_blocks(x.nbytes, _limits(x.device))


@cache
def _limits(device: torch.device) -> DeviceLimits:
    properties = torch.cuda.get_device_properties(device)
    kept_bytes = kernels.resident_bytes_per_block(device.index)
    return DeviceLimits(properties.multi_processor_count, kept_bytes)


def _stream(device: torch.device) -> int:
    # torch.cuda.current_stream() would take 5 us to create an object.
    return torch._C._cuda_getCurrentRawStream(device.index)
