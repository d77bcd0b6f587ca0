"""The Triton kernels: the walk over tiles, then one kernel for each way to walk.

`tiling.Tiling` says which program works on which tiles. ``TILE`` of every kernel is its ``tile``;
``sizes`` are its ``layout`` and the first of the tensor's programs, None for the only tensor.
"""

import triton
import triton.language as tl

from noisyq_fast.backends.on_triton.arithmetic import (
    averaged,
    is_observation,
    magnitude,
    quantized,
    scale_of,
    to_float,
)

# The walk over tiles.


@triton.jit
def tiles_along(size, tile):
    """Not ``tl.cdiv``, which adds before it divides: a size close to 2^31 would overflow."""
    return (size - 1) // tile + 1


@triton.jit
def channels_of_program(sizes, TILE: tl.constexpr):
    """The channels of this program, and which of them exist."""
    channel_tile = tl.program_id(0)
    if sizes[3] is not None:
        channel_tile -= sizes[3]
    channel = channel_tile.to(tl.int64) * TILE[1] + tl.arange(0, TILE[1])
    return channel, channel < sizes[1]


@triton.jit
def tiles_of_program(sizes, TILE: tl.constexpr):
    """How many tiles the channels of this program have."""
    return tiles_along(sizes[0], TILE[0]) * tiles_along(sizes[2], TILE[2])


@triton.jit
def elements_of_tile(tile, sizes, TILE: tl.constexpr):
    """Offsets of the elements of a tile, and which of them exist."""
    outer, channels, inner, _ = sizes
    # Triton compiles a size of 1 as a constant. So nothing is left of these divisions where outer
    # or inner is 1, and accesses are wide: that is why the second remainder is taken.
    outer_tiles, inner_tiles = tiles_along(outer, TILE[0]), tiles_along(inner, TILE[2])
    o = (tile % outer_tiles).to(tl.int64) * TILE[0] + tl.arange(0, TILE[0])
    c, c_exists = channels_of_program(sizes, TILE)
    i = (tile // outer_tiles % inner_tiles).to(tl.int64) * TILE[2] + tl.arange(0, TILE[2])
    offsets = (o[:, None, None] * channels + c[None, :, None]) * inner + i[None, None, :]
    exists = (o < outer)[:, None, None] & c_exists[None, :, None] & (i < inner)[None, None, :]
    return offsets, exists


@triton.jit
def largest_of_tile(magnitudes):
    """The largest magnitude of each channel of a tile."""
    return tl.max(tl.max(magnitudes, 2), 0)


@triton.jit
def _largest_in_tiles(x, sizes, TILE: tl.constexpr):
    """The largest magnitude of each channel, over all tiles of this program."""
    largest = tl.zeros(TILE, tl.int32)
    for tile in range(tl.program_id(1), tiles_of_program(sizes, TILE), tl.num_programs(1)):
        offsets, exists = elements_of_tile(tile, sizes, TILE)
        largest = tl.maximum(largest, magnitude(tl.load(x + offsets, exists, 0.0)))
    return largest_of_tile(largest)


@triton.jit
def _record(largest, scale, running, observed, averaging_constant, qmax, sizes, TILE: tl.constexpr):
    """The scale of each channel. One program for each channel stores what the operator returns."""
    absmax = largest.to(tl.float32, bitcast=True)
    scales = scale_of(absmax, qmax)
    if tl.program_id(1) == 0:
        channel, exists = channels_of_program(sizes, TILE)
        if scale is not None:
            tl.store(scale + channel, scales, exists)
        if running is not None:
            known = tl.load(running + channel, exists, 0.0)
            if observed is not None:
                known = tl.div_rn(known, tl.load(observed + channel, exists, 1.0))
            moves = exists & is_observation(absmax)
            tl.store(running + channel, averaged(known, absmax, averaging_constant), moves)
            if observed is not None:
                tl.store(observed + channel, 1.0, moves)
    return scales


@triton.jit
def _quantize_elements(x, y, offsets, exists, scales, qmax):
    scales = scales[None, :, None]
    quotient = tl.div_rn(to_float(x), scales)
    tl.store(y + offsets, quantized(quotient, scales, qmax, y.dtype.element_ty), exists)


@triton.jit
def _quantize_tiles(x, y, scales, qmax, sizes, TILE: tl.constexpr):
    tiles = tiles_of_program(sizes, TILE)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        # Backwards: what was reduced last is still in the cache.
        offsets, exists = elements_of_tile(tiles - 1 - tile, sizes, TILE)
        values = tl.load(x + offsets, exists, 0.0)
        _quantize_elements(values, y, offsets, exists, scales, qmax)


# The kernels. ``y`` receives int8 codes or values of any float dtype; it may be ``x``. ``scale``
# may be None, and so may ``running`` (the moving absmax) and ``observed``.


@triton.jit
def _quantize_channels(
    x,
    y,
    scale,
    running,
    observed,
    averaging_constant,
    qmax,
    sizes,
    TILE: tl.constexpr,
    ON_CHIP: tl.constexpr,
):
    """The channels of this program, if they belong to this tensor."""
    channel_tile = tl.program_id(0) - sizes[3]
    if (channel_tile >= 0) & (channel_tile < tiles_along(sizes[1], TILE[1])):
        if ON_CHIP:
            offsets, exists = elements_of_tile(tl.program_id(1), sizes, TILE)
            values = tl.load(x + offsets, exists, 0.0)
            largest = largest_of_tile(magnitude(values))
        else:
            largest = _largest_in_tiles(x, sizes, TILE)
        scales = _record(largest, scale, running, observed, averaging_constant, qmax, sizes, TILE)
        if ON_CHIP:
            _quantize_elements(values, y, offsets, exists, scales, qmax)
        else:
            _quantize_tiles(x, y, scales, qmax, sizes, TILE)


@triton.jit
def quantize_channels(
    x,
    y,
    scale,
    running,
    observed,
    averaging_constant,
    qmax,
    sizes,
    TILE: tl.constexpr,
    ON_CHIP: tl.constexpr,
):
    """Tuples of one argument for each tensor, of tensors whose channels no programs share. Channels
    of one tile each are read once (``ON_CHIP``), others twice."""
    for i in tl.static_range(len(TILE)):
        _quantize_channels(
            x[i],
            y[i],
            scale[i],
            running[i],
            observed[i],
            averaging_constant,
            qmax[i],
            sizes[i],
            tl.constexpr(TILE[i]),
            tl.constexpr(ON_CHIP[i]),
        )


@triton.jit
def reduce_partially(x, partial, sizes, TILE: tl.constexpr):
    """Channels that several programs share: the largest magnitudes, one row for each split."""
    channel, exists = channels_of_program(sizes, TILE)
    row = partial + tl.program_id(1).to(tl.int64) * sizes[1]
    tl.store(row + channel, _largest_in_tiles(x, sizes, TILE), exists)


@triton.jit
def quantize_reduced(
    x, partial, y, scale, running, observed, averaging_constant, qmax, sizes, TILE: tl.constexpr
):
    """The second launch, on the same grid: every program reduces the rows for itself."""
    CHANNELS: tl.constexpr = TILE[1]
    ROWS: tl.constexpr = 1024 // CHANNELS
    channel, exists = channels_of_program(sizes, TILE)
    largest = tl.zeros([ROWS, CHANNELS], tl.int32)
    for first in range(0, tl.num_programs(1), ROWS):
        row = first + tl.arange(0, ROWS)
        read = (row < tl.num_programs(1))[:, None] & exists[None, :]
        rows = partial + row.to(tl.int64)[:, None] * sizes[1] + channel[None, :]
        largest = tl.maximum(largest, tl.load(rows, read, 0))
    scales = _record(
        tl.max(largest, 0), scale, running, observed, averaging_constant, qmax, sizes, TILE
    )
    _quantize_tiles(x, y, scales, qmax, sizes, TILE)


@triton.jit
def quantize_fixed_range(x, absmax, y, qmax, sizes, TILE: tl.constexpr):
    """With an absmax for each channel that is known before."""
    channel, exists = channels_of_program(sizes, TILE)
    scales = scale_of(tl.load(absmax + channel, exists, 0.0), qmax)
    _quantize_tiles(x, y, scales, qmax, sizes, TILE)


@triton.jit
def dequantize(codes, scale, y, sizes, TILE: tl.constexpr):
    channel, channel_exists = channels_of_program(sizes, TILE)
    scales = tl.load(scale + channel, channel_exists, 0.0)[None, :, None]
    for tile in range(tl.program_id(1), tiles_of_program(sizes, TILE), tl.num_programs(1)):
        offsets, exists = elements_of_tile(tile, sizes, TILE)
        tl.store(y + offsets, tl.load(codes + offsets, exists, 0).to(tl.float32) * scales, exists)
