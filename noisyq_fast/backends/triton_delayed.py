"""The Triton kernels for ranges that clip: delayed scales, and ranges that are given.

The bits that tell which elements were clipped lie in the order of memory, eight to a byte
(`packing`). Arguments and tiles are otherwise as in `triton_kernels`.
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
from noisyq_fast.backends.triton_kernels import (
    channels_of_program,
    elements_of_tile,
    largest_of_tile,
    tiles_along,
    tiles_of_program,
)


@triton.jit
def _quantize_tile(values, y, clipped, tile, scales, qmax, sizes, TILE: tl.constexpr):
    """For the bits, 8 elements side by side have to be of one channel."""
    scales = scales[None, :, None]
    quotient = tl.div_rn(to_float(values), scales)
    if clipped is not None:
        outer, channels, inner, first = sizes
        sizes_in_bytes = outer, channels, tiles_along(inner, 8), first
        BYTES: tl.constexpr = (TILE[0], TILE[1], TILE[2] // 8)
        bits = is_clipped(quotient, qmax).to(tl.int32) << (tl.arange(0, TILE[2]) % 8)
        bits = tl.sum(tl.reshape(bits, (TILE[0], TILE[1], TILE[2] // 8, 8)), 3)
        offsets, exists = elements_of_tile(tile, sizes_in_bytes, BYTES)
        tl.store(clipped + offsets, bits.to(tl.uint8), exists)
    offsets, exists = elements_of_tile(tile, sizes, TILE)
    tl.store(y + offsets, quantized(quotient, scales, qmax, y.dtype.element_ty), exists)


@triton.jit
def quantize_delayed(
    x, y, clipped, progress, running, averaging_constant, qmax, sizes, TILE: tl.constexpr
):
    """Quantizes with the ranges before the batch, and reduces the batch's absmax in the same pass.
    ``y`` must not be ``x``. ``progress`` is the largest magnitude of each channel so far, then how
    many programs of each channel tile are done: all 0 before and after."""
    programs = tl.num_programs(1)
    done = progress + sizes[1] + tl.program_id(0)
    channel, exists = channels_of_program(sizes, TILE)
    scales = scale_of(tl.load(running + channel, exists, 0.0), qmax)
    tiles = tiles_of_program(sizes, TILE)
    # With bits, groups of 8 are reduced at once: that frees registers.
    GROUP: tl.constexpr = 1 if clipped is None else 8
    largest = tl.zeros((TILE[0], TILE[1], TILE[2] // GROUP), tl.int32)
    for tile in range(tl.program_id(1), tiles, programs):
        offsets, mask = elements_of_tile(tile, sizes, TILE)
        values = tl.load(x + offsets, mask, 0.0)
        groups = tl.reshape(magnitude(values), (TILE[0], TILE[1], TILE[2] // GROUP, GROUP))
        largest = tl.maximum(largest, tl.max(groups, 3))
        _quantize_tile(values, y, clipped, tile, scales, qmax, sizes, TILE)

    tl.atomic_max(progress + channel, largest_of_tile(largest), exists, sem="relaxed")
    tl.debug_barrier()
    # Releases the maxima above to the last program, and acquires those of all others.
    if tl.atomic_add(done, 1, sem="acq_rel") == programs - 1:
        # Read again: that frees registers in the loop.
        before = tl.load(running + channel, exists, 0.0)
        absmax = tl.atomic_max(progress + channel, tl.zeros([TILE[1]], tl.int32), exists)
        absmax = absmax.to(tl.float32, bitcast=True)
        # The first batch has no range before it, and is NaN so far: the last program quantizes it
        # by its own absmax.
        unseen = before != before
        if tl.max(unseen.to(tl.int32), 0) != 0:
            scales = scale_of(tl.where(unseen, absmax, before), qmax)
            for tile in range(tiles):
                offsets, mask = elements_of_tile(tile, sizes, TILE)
                values = tl.load(x + offsets, mask, 0.0)
                _quantize_tile(values, y, clipped, tile, scales, qmax, sizes, TILE)
        tl.debug_barrier()
        tl.store(running + channel, averaged(before, absmax, averaging_constant), exists)
        tl.store(progress + channel, 0, exists)
        tl.store(done, 0)


@triton.jit
def _groups_of_tile(tile, elements, GROUPS: tl.constexpr):
    """The groups of 8 elements of a tile, the offsets of the elements, and which of those exist."""
    groups = tl.cast(tile, tl.int64) * GROUPS + tl.arange(0, GROUPS)
    offsets = groups[:, None] * 8 + tl.arange(0, 8)[None, :]
    return groups, offsets, offsets < elements


@triton.jit
def quantize_clipped(x, absmax, y, clipped, qmax, channels, inner, sizes, TILE: tl.constexpr):
    """With an absmax for each channel that is known before, over memory as it lies. ``y`` may be
    None."""
    GROUPS: tl.constexpr = (TILE[2] + 7) // 8
    elements = sizes[2]
    for tile in range(tl.program_id(1), tiles_along(elements, GROUPS * 8), tl.num_programs(1)):
        groups, offsets, exists = _groups_of_tile(tile, elements, GROUPS)
        scales = scale_of(tl.load(absmax + offsets // inner % channels), qmax)
        quotient = tl.div_rn(to_float(tl.load(x + offsets, exists, 0.0)), scales)
        bits = is_clipped(quotient, qmax).to(tl.int32) << tl.arange(0, 8)[None, :]
        tl.store(clipped + groups, tl.sum(bits, 1).to(tl.uint8), groups * 8 < elements)
        if y is not None:
            tl.store(y + offsets, quantized(quotient, scales, qmax, y.dtype.element_ty), exists)


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
