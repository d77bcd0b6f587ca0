"""One bit for each element of a dense tensor, in the order of its memory, eight to a byte."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """The uint8 bytes of a dense bool tensor; the first element is the lowest bit.

    Example:
        >>> import torch
        >>> pack(torch.tensor([True, False, True] + 6 * [False]))
        tensor([5, 0], dtype=torch.uint8)
    """
    flat = mask.as_strided((mask.numel(),), (1,)).to(torch.uint8)
    bytes_ = F.pad(flat, (0, -mask.numel() % 8)).view(-1, 8)
    return (bytes_ << _positions(mask)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, like: Tensor) -> Tensor:
    """The bool tensor of which ``packed`` was made, laid out like the dense tensor ``like``."""
    bits = packed.unsqueeze(1) >> _positions(packed) & 1
    return bits.flatten()[: like.numel()].bool().as_strided(like.shape, like.stride())


def _positions(x: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=x.device)
