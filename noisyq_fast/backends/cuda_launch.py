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
        share_bytes: what a block should have to read at least: 256 threads, and four loads of 16
            bytes for each.
    """

    multiprocessors: int
    kept_bytes: int = 0
    share_bytes: int = 256 * 16 * 4


# Blocks of 256 threads that a multiprocessor holds.
_BLOCKS_PER_MULTIPROCESSOR = 8


def splits_per_channel(channel_bytes: int, channels: int, limits: DeviceLimits) -> int:
    """How many blocks share the elements of a channel: enough to fill the device, each with work.

    Example:
        >>> splits_per_channel(8 << 20, channels=1, limits=DeviceLimits(multiprocessors=132))
        512
        >>> splits_per_channel(8 << 20, channels=64, limits=DeviceLimits(multiprocessors=132))
        17
    """
    with_work = -(-channel_bytes // limits.share_bytes)
    to_fill = -(-_BLOCKS_PER_MULTIPROCESSOR * limits.multiprocessors // channels)
    return max(1, min(with_work, to_fill))


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
    return max(1, min(-(-tensor_bytes // limits.share_bytes), limits.multiprocessors))


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
