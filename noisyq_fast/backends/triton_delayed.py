"""The Triton kernels for delayed scales, of a tensor with a single range.

They walk over memory in groups of 8 elements: the bits that tell which of them were clipped are one
byte (`packing`). Arguments and tiles are otherwise as in `triton_kernels`.
"""

import triton
import triton.language as tl

from noisyq_fast.backends.triton_arithmetic import (
    averaged,
    is_clipped,
    magnitude,
    quantized,
    scale_of,
    to_float,
)
from noisyq_fast.backends.triton_kernels import tiles_along


@triton.jit
def _elements(tile, elements, GROUPS: tl.constexpr):
    """The groups of a tile, the offsets of their elements, and which of those exist."""
    groups = tl.cast(tile, tl.int64) * GROUPS + tl.arange(0, GROUPS)
    offsets = groups[:, None] * 8 + tl.arange(0, 8)[None, :]
    return groups, offsets, offsets < elements


@triton.jit
def _quantize_elements(x, y, clipped, groups, offsets, exists, scale, qmax, elements):
    quotient = tl.div_rn(to_float(x), scale)
    tl.store(y + offsets, quantized(quotient, scale, qmax, y.dtype.element_ty), exists)
    if clipped is not None:
        bits = is_clipped(quotient, qmax).to(tl.int32) << tl.arange(0, 8)[None, :]
        tl.store(clipped + groups, tl.sum(bits, 1).to(tl.uint8), groups * 8 < elements)


@triton.jit
def quantize_delayed(
    x, y, clipped, progress, running, averaging_constant, qmax, sizes, TILE: tl.constexpr
):
    """Quantizes with the range before the batch, where there is one, and reduces the batch's absmax
    in the same pass. ``progress`` is the largest magnitude so far and how many programs are done:
    both are 0 before and after."""
    GROUPS: tl.constexpr = (TILE[2] + 7) // 8
    elements = sizes[2]
    programs = tl.num_programs(1)
    before = tl.load(running)
    scale = scale_of(before, qmax)
    tiles = tiles_along(elements, GROUPS * 8)
    largest = tl.zeros([GROUPS], tl.int32)
    for tile in range(tl.program_id(1), tiles, programs):
        groups, offsets, exists = _elements(tile, elements, GROUPS)
        values = tl.load(x + offsets, exists, 0.0)
        largest = tl.maximum(largest, tl.max(magnitude(values), 1))
        if before == before:
            _quantize_elements(values, y, clipped, groups, offsets, exists, scale, qmax, elements)

    tl.atomic_max(progress, tl.max(largest, 0), sem="relaxed")
    # Releases the maximum above to the last program, and acquires those of all others.
    done = tl.atomic_add(progress + 1, 1, sem="acq_rel")
    if done == programs - 1:
        # Read again: that frees a register in the loop. And before the barrier of the atomic, which
        # no warp passes, on to the store below, while another is still here.
        before = tl.load(running)
        absmax = tl.atomic_max(progress, 0, sem="relaxed").to(tl.float32, bitcast=True)
        # The first batch has no range before it: the last program quantizes it all by its own.
        if before != before:
            scale = scale_of(absmax, qmax)
            for tile in range(tiles):
                groups, offsets, exists = _elements(tile, elements, GROUPS)
                values = tl.load(x + offsets, exists, 0.0)
                _quantize_elements(
                    values, y, clipped, groups, offsets, exists, scale, qmax, elements
                )
        tl.store(running, averaged(before, absmax, averaging_constant))
        tl.store(progress + tl.arange(0, 2), 0)


@triton.jit
def zero_clipped(grad, out, clipped, sizes, TILE: tl.constexpr):
    GROUPS: tl.constexpr = (TILE[2] + 7) // 8
    elements = sizes[2]
    for tile in range(tl.program_id(1), tiles_along(elements, GROUPS * 8), tl.num_programs(1)):
        groups, offsets, exists = _elements(tile, elements, GROUPS)
        bits = tl.load(clipped + groups, groups * 8 < elements, 0).to(tl.int32)
        is_zero = ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
        values = tl.load(grad + offsets, exists, 0.0)
        tl.store(out + offsets, tl.where(is_zero, 0.0, values), exists)
