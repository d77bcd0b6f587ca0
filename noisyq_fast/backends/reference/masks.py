"""Masks of the elements that have no gradient: one bit for each element of a dense tensor, in the
order of its memory, eight to a byte."""

import torch
import torch.nn.functional as F
from torch import Tensor

NOTHING, NEGATIVE, CLIPPED = MASKED = ("nothing", "negative", "clipped")
"""Which elements have no gradient: none, those below 0, or those that are clipped (on an unsigned
grid those below 0 too)."""


def pack(mask: Tensor) -> Tensor:
    """The uint8 bytes of a dense bool tensor; the first element is the lowest bit.

    Example:
        >>> import torch
        >>> pack(torch.tensor([True, False, True] + 6 * [False]))
        tensor([5, 0], dtype=torch.uint8)
    """
    flat = mask.as_strided((mask.numel(),), (1,))
    return packed(F.pad(flat, (0, -mask.numel() % 8)))


def pack_like(x: Tensor, mask: Tensor) -> Tensor:
    """The bytes of a mask in the order of the memory of ``x``."""
    return pack(torch.empty_like(x, dtype=torch.bool).copy_(mask))


def unpack(bytes_: Tensor, like: Tensor) -> Tensor:
    """The bool tensor that was packed, laid out like the dense tensor ``like``."""
    return unpacked(bytes_)[: like.numel()].as_strided(like.shape, like.stride())


def packed(bits: Tensor) -> Tensor:
    """Packs the last axis, whose size is a multiple of 8, into bytes."""
    eights = bits.to(torch.uint8).unflatten(-1, (bits.shape[-1] // 8, 8))
    return (eights << _positions(bits)).sum(-1, dtype=torch.uint8)


def unpacked(bytes_: Tensor) -> Tensor:
    return (bytes_.unsqueeze(-1) >> _positions(bytes_) & 1).flatten(-2).bool()


def _positions(x: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=x.device)
