"""The Triton kernels that quantize on grids: one for each kind of walk over the tiles (`tiles`)."""

import triton
import triton.language as tl

from noisyq_fast.backends.on_triton.arithmetic import (
    AFFINE,
    SIGNED,
    averaged,
    ends_of,
    from_float,
    high_key,
    is_observation,
    levels_of,
    low_key,
    quantized,
    rounded_of,
    to_float,
)
from noisyq_fast.backends.on_triton.tiles import (
    channel_tile_of_program,
    channels_of_program,
    elements_of_tile,
    tiles_along,
    tiles_of_program,
)


@triton.jit
def load_ends(range_, channel, exists, KIND: tl.constexpr, channels):
    """The low and the high end of the range of channels; equal for grids that are not affine."""
    low = tl.load(range_ + channel, exists, 0.0)
    high = low
    if KIND == AFFINE:
        high = tl.load(range_ + channels + channel, exists, 0.0)
    return low, high


@triton.jit
def _store_ends(range_, low, high, channel, exists, KIND: tl.constexpr, channels):
    if KIND == AFFINE:
        tl.store(range_ + channel, low, exists)
        range_ += channels
    tl.store(range_ + channel, high, exists)


@triton.jit
def _store_levels(scale, zero, scales, zeros, channel, exists):
    if scale is not None:
        tl.store(scale + channel, scales, exists)
    if zero is not None:
        tl.store(zero + channel, zeros.to(tl.int32).to(tl.uint8), exists)


@triton.jit
def _largest_of_tile(keys):
    """The largest key of each channel of a tile."""
    return tl.max(tl.max(keys, 2), 0)


@triton.jit
def _largest_in_tiles(x, KIND: tl.constexpr, sizes, TILE: tl.constexpr):
    """The largest keys, low and high, of each channel, over all tiles of this program."""
    low = tl.zeros(TILE, tl.int32)
    high = tl.zeros(TILE, tl.int32)
    for tile in range(tl.program_id(1), tiles_of_program(sizes, TILE), tl.num_programs(1)):
        offsets, exists = elements_of_tile(tile, sizes, TILE)
        values = tl.load(x + offsets, exists, 0.0)
        high = tl.maximum(high, high_key(values, KIND))
        if KIND == AFFINE:
            low = tl.maximum(low, low_key(values))
    return _largest_of_tile(low), _largest_of_tile(high)


@triton.jit
def move_average(
    running,
    observed,
    low,
    high,
    averaging_constant,
    channel,
    exists,
    KIND: tl.constexpr,
    channels,
):
    """Moves the average, ``running / observed``, towards the range of a batch."""
    known_low, known_high = load_ends(running, channel, exists, KIND, channels)
    if observed is not None:
        weight = tl.load(observed + channel, exists, 1.0)
        known_low, known_high = tl.div_rn(known_low, weight), tl.div_rn(known_high, weight)
    width = high
    if KIND == AFFINE:
        width = high - low
    moves = exists & is_observation(width)
    known_low = averaged(known_low, low, averaging_constant)
    known_high = averaged(known_high, high, averaging_constant)
    _store_ends(running, known_low, known_high, channel, moves, KIND, channels)
    if observed is not None:
        tl.store(observed + channel, 1.0, moves)


@triton.jit
def _record(
    low,
    high,
    scale,
    zero,
    running,
    observed,
    averaging_constant,
    qmax,
    KIND: tl.constexpr,
    sizes,
    TILE: tl.constexpr,
):
    """The scale and the zero point of each channel, from its largest keys. One program per channel
    stores the outputs of the operator."""
    low, high = ends_of(low, high, KIND)
    scales, zeros = levels_of(low, high, qmax, KIND)
    if tl.program_id(1) == 0:
        channel, exists = channels_of_program(sizes, TILE)
        _store_levels(scale, zero, scales, zeros, channel, exists)
        if running is not None:
            move_average(
                running, observed, low, high, averaging_constant, channel, exists, KIND, sizes[1]
            )
    return scales, zeros


@triton.jit
def _quantize_elements(x, y, offsets, exists, scales, zeros, qmax, KIND: tl.constexpr):
    scales, zeros = scales[None, :, None], zeros[None, :, None]
    rounded = rounded_of(tl.div_rn(to_float(x), scales))
    dtype: tl.constexpr = y.dtype.element_ty
    tl.store(y + offsets, quantized(rounded, scales, zeros, qmax, KIND, dtype), exists)


@triton.jit
def _quantize_tiles(x, y, scales, zeros, qmax, KIND: tl.constexpr, sizes, TILE: tl.constexpr):
    tiles = tiles_of_program(sizes, TILE)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        # Backwards: what was reduced last is still in the cache.
        offsets, exists = elements_of_tile(tiles - 1 - tile, sizes, TILE)
        values = tl.load(x + offsets, exists, 0.0)
        _quantize_elements(values, y, offsets, exists, scales, zeros, qmax, KIND)


# The kernels. ``y`` receives codes or values of any float dtype; it may be ``x``. It may be None,
# and so may ``scale``, ``zero``, ``running`` (the moving range) and ``observed``. Where the grid,
# ``KIND``, is affine, ranges are the low ends of all channels and then the high ends.


@triton.jit
def quantize_tensor(
    x,
    y,
    scale,
    zero,
    running,
    observed,
    averaging_constant,
    qmax,
    KIND: tl.constexpr,
    ON_CHIP: tl.constexpr,
    sizes,
    TILE: tl.constexpr,
):
    """Quantizes the channels of this program, if they belong to this tensor. Channels of one tile
    are read once (``ON_CHIP``), others twice."""
    channel_tile = channel_tile_of_program(sizes)
    if (channel_tile >= 0) & (channel_tile < tiles_along(sizes[1], TILE[1])):
        if ON_CHIP:
            offsets, exists = elements_of_tile(tl.program_id(1), sizes, TILE)
            values = tl.load(x + offsets, exists, 0.0)
            low = _largest_of_tile(low_key(values))
            high = _largest_of_tile(high_key(values, KIND))
        else:
            low, high = _largest_in_tiles(x, KIND, sizes, TILE)
        scales, zeros = _record(
            low,
            high,
            scale,
            zero,
            running,
            observed,
            averaging_constant,
            qmax,
            KIND,
            sizes,
            TILE,
        )
        if y is not None:
            if ON_CHIP:
                _quantize_elements(values, y, offsets, exists, scales, zeros, qmax, KIND)
            else:
                _quantize_tiles(x, y, scales, zeros, qmax, KIND, sizes, TILE)


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
    """Quantizes several tensors on the signed grid, whose channels are not shared by programs. Each
    argument is a tuple with one value per tensor."""
    for i in tl.static_range(len(TILE)):
        quantize_tensor(
            x[i],
            y[i],
            scale[i],
            None,
            running[i],
            observed[i],
            averaging_constant,
            qmax[i],
            SIGNED,
            tl.constexpr(ON_CHIP[i]),
            sizes[i],
            tl.constexpr(TILE[i]),
        )


@triton.jit
def reduce_partially(x, partial, KIND: tl.constexpr, sizes, TILE: tl.constexpr):
    """Reduces channels that several programs share to their largest keys, one row per split; the
    rows of the high keys come first."""
    channel, exists = channels_of_program(sizes, TILE)
    low, high = _largest_in_tiles(x, KIND, sizes, TILE)
    row = partial + tl.program_id(1).to(tl.int64) * sizes[1]
    tl.store(row + channel, high, exists)
    if KIND == AFFINE:
        tl.store(row + tl.num_programs(1).to(tl.int64) * sizes[1] + channel, low, exists)


@triton.jit
def _largest_of_rows(partial, sizes, TILE: tl.constexpr):
    CHANNELS: tl.constexpr = TILE[1]
    ROWS: tl.constexpr = 1024 // CHANNELS
    channel, exists = channels_of_program(sizes, TILE)
    largest = tl.zeros([ROWS, CHANNELS], tl.int32)
    for first in range(0, tl.num_programs(1), ROWS):
        row = first + tl.arange(0, ROWS)
        read = (row < tl.num_programs(1))[:, None] & exists[None, :]
        rows = partial + row.to(tl.int64)[:, None] * sizes[1] + channel[None, :]
        largest = tl.maximum(largest, tl.load(rows, read, 0))
    return tl.max(largest, 0)


@triton.jit
def quantize_reduced(
    x,
    partial,
    y,
    scale,
    zero,
    running,
    observed,
    averaging_constant,
    qmax,
    KIND: tl.constexpr,
    sizes,
    TILE: tl.constexpr,
):
    """Maps, in a second launch on the same grid; every program reduces the rows itself."""
    high = _largest_of_rows(partial, sizes, TILE)
    low = high
    if KIND == AFFINE:
        of_low = partial + tl.num_programs(1).to(tl.int64) * sizes[1]
        low = _largest_of_rows(of_low, sizes, TILE)
    scales, zeros = _record(
        low,
        high,
        scale,
        zero,
        running,
        observed,
        averaging_constant,
        qmax,
        KIND,
        sizes,
        TILE,
    )
    if y is not None:
        _quantize_tiles(x, y, scales, zeros, qmax, KIND, sizes, TILE)


@triton.jit
def quantize_fixed_range(
    x, range_, y, scale, zero, qmax, KIND: tl.constexpr, sizes, TILE: tl.constexpr
):
    """Quantizes with a given range for each channel."""
    channel, exists = channels_of_program(sizes, TILE)
    low, high = load_ends(range_, channel, exists, KIND, sizes[1])
    scales, zeros = levels_of(low, high, qmax, KIND)
    if tl.program_id(1) == 0:
        _store_levels(scale, zero, scales, zeros, channel, exists)
    if y is not None:
        _quantize_tiles(x, y, scales, zeros, qmax, KIND, sizes, TILE)


@triton.jit
def dequantize(codes, scale, zero, y, sizes, TILE: tl.constexpr):
    """Dequantizes; without a scale, only subtracts the zero point."""
    channel, channel_exists = channels_of_program(sizes, TILE)
    scales = 1.0
    if scale is not None:
        scales = tl.load(scale + channel, channel_exists, 0.0)[None, :, None]
    if zero is not None:
        zeros = tl.load(zero + channel, channel_exists, 0).to(tl.float32)[None, :, None]
    for tile in range(tl.program_id(1), tiles_of_program(sizes, TILE), tl.num_programs(1)):
        offsets, exists = elements_of_tile(tile, sizes, TILE)
        steps = tl.load(codes + offsets, exists, 0).to(tl.float32)
        if zero is not None:
            steps -= zeros
        tl.store(y + offsets, from_float(steps * scales, y.dtype.element_ty), exists)
