"""How far a launch is, counted on the device: what blocks that meet at a ticket share."""

from functools import cache

import torch
from torch import Tensor


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
