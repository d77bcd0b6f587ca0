"""The Triton kernels that compute the mask of elements without a gradient, and mask gradients.

The bits of a mask are in memory order, eight per byte (`reference.masks.pack`).
Arguments are otherwise as in `grid_kernels`.
"""

import triton
import triton.language as tl

from noisyq_fast.backends.on_triton.arithmetic import (
    is_masked,
    levels_of,
    quantized,
    rounded_of,
    to_float,
)
from noisyq_fast.backends.on_triton.grid_kernels import load_ends
from noisyq_fast.backends.on_triton.tiles import tiles_along


@triton.jit
def _groups_of_tile(tile, elements, GROUPS: tl.constexpr):
    """The groups of 8 elements of a tile, the offsets of the elements, and which of those exist."""
    groups = tl.cast(tile, tl.int64) * GROUPS + tl.arange(0, GROUPS)
    offsets = groups[:, None] * 8 + tl.arange(0, 8)[None, :]
    return groups, offsets, offsets < elements


@triton.jit
def quantize_masked(
    x,
    range_,
    scale,
    zero,
    y,
    mask,
    qmax,
    KIND: tl.constexpr,
    MASKED: tl.constexpr,
    channels,
    inner,
    sizes,
    TILE: tl.constexpr,
):
    """Computes the mask, in memory order, from a given range of each channel or else from its scale
    and zero point. ``inner`` is None if there is one channel."""
    GROUPS: tl.constexpr = (TILE[2] + 7) // 8
    elements = sizes[2]
    for tile in range(tl.program_id(1), tiles_along(elements, GROUPS * 8), tl.num_programs(1)):
        groups, offsets, exists = _groups_of_tile(tile, elements, GROUPS)
        channel = 0 if inner is None else offsets // inner % channels
        if range_ is None:
            scales = tl.load(scale + channel)
            zeros = tl.load(zero + channel).to(tl.float32)
        else:
            low, high = load_ends(range_, channel, True, KIND, channels)
            scales, zeros = levels_of(low, high, qmax, KIND)
        values = to_float(tl.load(x + offsets, exists, 0.0))
        rounded = rounded_of(tl.div_rn(values, scales))
        bits = is_masked(values, rounded, zeros, qmax, KIND, MASKED).to(tl.int32)
        bits <<= tl.arange(0, 8)[None, :]
        tl.store(mask + groups, tl.sum(bits, 1).to(tl.uint8), groups * 8 < elements)
        dtype: tl.constexpr = y.dtype.element_ty
        tl.store(y + offsets, quantized(rounded, scales, zeros, qmax, KIND, dtype), exists)


@triton.jit
def zero_clipped(grad, out, clipped, sizes, TILE: tl.constexpr):
    GROUPS: tl.constexpr = (TILE[2] + 7) // 8
    elements = sizes[2]
    for tile in range(tl.program_id(1), tiles_along(elements, GROUPS * 8), tl.num_programs(1)):
        groups, offsets, exists = _groups_of_tile(tile, elements, GROUPS)
        bits = tl.load(clipped + groups, groups * 8 < elements, 0).to(tl.int32)
        is_zero = ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
        values = tl.load(grad + offsets, exists, 0.0)
        tl.store(out + offsets, tl.where(is_zero, 0.0, values), exists)
