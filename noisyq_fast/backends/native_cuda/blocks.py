"""Launch configurations of CUDA kernels: the number of blocks, and their counters.

Results do not depend on the number of blocks: the only reduction is a maximum.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeviceLimits:
    """Limits of a GPU.

    Attributes:
        multiprocessors: their number.
        kept_bytes: the bytes of a tensor that one block can keep on chip in a cooperative launch;
            0 if there is no such launch.
        access_bytes: the bytes that the threads of a block read at once: 256 times 16.
    """

    multiprocessors: int
    kept_bytes: int = 0
    access_bytes: int = 256 * 16


# Blocks of 256 threads that a multiprocessor holds.
_BLOCKS_PER_MULTIPROCESSOR = 8
# The loads of a thread before it uses the first (kInFlight in csrc/cuda), and how many times the
# blocks of a map may fill the device: with fewer, larger blocks the last would leave most of it
# idle.
_IN_FLIGHT = 2
_MAP_WAVES = 8


def splits_of_reduction(channel_bytes: int, channels: int, limits: DeviceLimits) -> int:
    """The number of blocks that reduce a channel: enough to fill the device, each with work.

    Example:
        >>> splits_of_reduction(8 << 20, channels=1, limits=DeviceLimits(multiprocessors=132))
        1056
        >>> splits_of_reduction(8 << 20, channels=64, limits=DeviceLimits(multiprocessors=132))
        17
    """
    with_work = -(-channel_bytes // limits.access_bytes)
    return max(1, min(with_work, _to_fill(limits, channels)))


def splits_of_map(channel_bytes: int, channels: int, limits: DeviceLimits) -> int:
    """The number of blocks that map a channel: at least that of the reduction, and more if each
    still has enough loads in flight.

    Example:
        >>> splits_of_map(8 << 20, channels=1, limits=DeviceLimits(multiprocessors=132))
        1056
        >>> splits_of_map(64 << 20, channels=1, limits=DeviceLimits(multiprocessors=132))
        8192
    """
    with_full_loads = -(-channel_bytes // (_IN_FLIGHT * limits.access_bytes))
    several_waves = _MAP_WAVES * _to_fill(limits, channels)
    return max(
        splits_of_reduction(channel_bytes, channels, limits), min(with_full_loads, several_waves)
    )


def _to_fill(limits: DeviceLimits, channels: int) -> int:
    return -(-_BLOCKS_PER_MULTIPROCESSOR * limits.multiprocessors // channels)


def resident_blocks(tensor_bytes: int, limits: DeviceLimits) -> int | None:
    """The number of blocks that keep a tensor on chip: at most one per multiprocessor, each with
    work.

    Returns:
        ``None`` if the tensor does not fit.

    Example:
        >>> limits = DeviceLimits(multiprocessors=132, kept_bytes=226 << 10)
        >>> [resident_blocks(n, limits) for n in (100, 8 << 20, 64 << 20)]
        [1, 132, None]
    """
    # A pack of 16 bytes may be left over for each block.
    if tensor_bytes > limits.multiprocessors * (limits.kept_bytes - 16):
        return None
    with_work = -(-tensor_bytes // (_IN_FLIGHT * limits.access_bytes))
    return max(1, min(with_work, limits.multiprocessors))


def progress(device: torch.device, size: int) -> Tensor:
    """int32 ``[size]`` counters of the current stream, which are 0 before and after each launch.

    A graph gets its own: it may be replayed concurrently with the stream that recorded it.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    return _of_stream(device, torch.cuda.current_stream(device).cuda_stream, size)


@cache
def _of_stream(device: torch.device, stream: int, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)
