"""What a launch of a CUDA kernel needs beside its tensors: how many blocks, and what they count.

Results do not depend on the number of blocks: the only reduction is a maximum.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeviceLimits:
    """What one GPU holds.

    Attributes:
        multiprocessors: how many it has.
        kept_bytes: of a tensor, that one block can keep on chip in a cooperative launch; 0 where
            there is none.
        access_bytes: what the threads of a block read at once: 256 times 16 bytes.
    """

    multiprocessors: int
    kept_bytes: int = 0
    access_bytes: int = 256 * 16


# Blocks of 256 threads that a multiprocessor holds.
_BLOCKS_PER_MULTIPROCESSOR = 8
# What a thread loads before it uses the first (kInFlight in csrc/cuda), and how often blocks of a
# map may fill the device: the last of a few large ones would leave most of it idle.
_IN_FLIGHT = 2
_MAP_WAVES = 8


def splits_of_reduction(channel_bytes: int, channels: int, limits: DeviceLimits) -> int:
    """How many blocks reduce a channel: enough to fill the device, each with work.

    Example:
        >>> splits_of_reduction(8 << 20, channels=1, limits=DeviceLimits(multiprocessors=132))
        1056
        >>> splits_of_reduction(8 << 20, channels=64, limits=DeviceLimits(multiprocessors=132))
        17
    """
    with_work = -(-channel_bytes // limits.access_bytes)
    return max(1, min(with_work, _to_fill(limits, channels)))


def splits_of_map(channel_bytes: int, channels: int, limits: DeviceLimits) -> int:
    """How many blocks map a channel: as many, and more where they keep enough loads in flight.

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
    """How many blocks keep a tensor on chip: at most one for each multiprocessor, each with work.

    Returns:
        ``None`` where they cannot.

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
    """int32 `[size]` of zeros that a launch leaves as it finds them, of the current stream alone.

    A graph gets new ones: it may be replayed beside the stream that it was recorded on.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    return _of_stream(device, torch.cuda.current_stream(device).cuda_stream, size)


@cache
def _of_stream(device: torch.device, stream: int, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)
