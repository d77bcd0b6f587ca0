"""Codes of a few bits, packed into bytes: code after code, from the lowest bit of each byte. A
byte holds two codes of 4 bits or four of 2 bits; three bytes hold eight codes of 3 bits."""

import numpy as np
import torch
from torch import Tensor

from noisyq_fast.grid import Grid

_AT_ONCE = 2**20


def pack_codes(codes: Tensor, grid: Grid) -> Tensor:
    """The bytes, uint8 ``[n]``, of codes in the order of their indices."""
    steps = (
        ((codes.flatten().cpu().to(torch.int16) - grid.code_min) // grid.code_step)
        .to(torch.uint8)
        .numpy()
    )
    parts = [
        np.packbits(_bits(steps[start : start + _AT_ONCE], grid.bits), bitorder="little")
        for start in range(0, len(steps), _AT_ONCE)
    ]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *parts]))


def unpack_codes(packed: Tensor, grid: Grid, shape: torch.Size) -> Tensor:
    """The codes in packed bytes; a ValueError if the size or a code does not fit."""
    count, bits = shape.numel(), grid.bits
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(count, bits),):
        got = f"{packed.dtype} of shape {list(packed.shape)}"
        takes = f"{packed_size(count, bits)} bytes for {count} codes of {bits} bits"
        raise ValueError(f"got codes in {got}, takes {takes}")
    stream = packed.numpy()
    places = np.arange(bits, dtype=np.uint8)
    parts = [np.zeros(0, np.uint8)]
    size = _AT_ONCE * bits // 8
    for start in range(0, len(stream), size):
        part: np.ndarray = np.unpackbits(stream[start : start + size], bitorder="little")
        part = part[: len(part) // bits * bits].reshape(-1, bits)
        parts.append((part << places).sum(1, dtype=np.uint8))
    steps = torch.from_numpy(np.concatenate(parts)[:count]).to(torch.int16)
    codes = grid.code_min + grid.code_step * steps
    if count and int(codes.max()) > grid.code_max:
        raise ValueError(f"got the code {int(codes.max())}, takes {grid.code_min}..{grid.code_max}")
    return codes.to(grid.code_dtype).view(shape)


def packed_size(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _bits(steps: np.ndarray, bits: int) -> np.ndarray:
    return (steps[:, np.newaxis] >> np.arange(bits, dtype=np.uint8)) & 1
